"""The conversion itself: planned, run by several processes, resumable."""
