"""Fault tolerance: detects failures, records them and restarts; events, heartbeats, exit codes."""
