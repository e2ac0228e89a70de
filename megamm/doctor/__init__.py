"""Checks of the installation, of a node before a run, and of several nodes against each other."""
