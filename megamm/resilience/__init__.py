"""Failures seen, told and survived: events, heartbeats, exit codes."""
