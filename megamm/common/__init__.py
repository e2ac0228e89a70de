"""Modules that every other package uses: errors, the device, timers, events, processes, progress of long commands."""
