"""How a run's process ends, for the launcher above it (Slurm, Kubernetes, a shell)."""

DONE = 0
CRASHED = 1
"""A failure that another try may survive."""
USER_ERROR = 2
"""Something the user must mend first: do not retry."""
GAVE_UP = 3
"""Restarts are used up, or it crashes at the same step again and again: do not retry."""
EVICTED = 4
"""This node's hardware is at fault, or too slow, and the job goes on without it if it can: drain the node."""
REQUEUE = 75
"""A signal ended it with a checkpoint written: run the same command again (sysexits.h: EX_TEMPFAIL)."""

# Between a rank and the agent that started it. A plain 0 is none of them: whatever ends a rank early is no success.
RANK_DONE = 40
RANK_REGROUP = 41
"""Stopped at a step boundary with a checkpoint, because nodes joined, or one is to leave."""
RANK_EVICTED = 42
"""The same, and this node is to leave."""
