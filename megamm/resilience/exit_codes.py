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

# Between a rank and the agent that started it. A plain 0 is none of them: whatever ends a rank early is no success.
RANK_DONE = 40
RANK_REGROUP = 41
"""Stopped at a step boundary with a checkpoint, because nodes joined."""
