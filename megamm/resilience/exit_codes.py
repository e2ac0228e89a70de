"""How a run's process ends, for the launcher above it (Slurm, Kubernetes, a shell)."""

DONE = 0
CRASHED = 1
"""A failure that another try may survive."""
USER_ERROR = 2
"""Something the user must mend first: do not retry."""
GAVE_UP = 3
"""Restarts are used up, or it crashes at the same step again and again: do not retry."""
REQUEUE = 75
"""A signal ended it with a checkpoint written: run the same command again (sysexits.h: EX_TEMPFAIL)."""
