"""Exit codes of a run, for whatever started it (Slurm, Kubernetes, a shell), and of its ranks, for the agent."""

DONE = 0
CRASHED = 1
"""A failure that may not occur again: a retry may succeed."""
USER_ERROR = 2
"""An error that the user must fix first: do not retry."""
GAVE_UP = 3
"""All restarts are used up, or it fails at the same step repeatedly: do not retry."""
EVICTED = 4
"""This node's hardware is faulty or too slow; the job continues without it if it can: drain the node."""
REQUEUE = 75
"""Stopped by a signal after writing a checkpoint: run the same command again (sysexits.h: EX_TEMPFAIL)."""

# Exit codes of a rank. 0 is not among them: a rank that exits early, with sys.exit(), has not succeeded.
RANK_DONE = 40
RANK_REGROUP = 41
"""Stopped at a step boundary with a checkpoint, because nodes joined or another node must leave."""
RANK_EVICTED = 42
"""The same, but this node must leave."""
AGENT_ALONE = 43
"""Of an agent: too few nodes came in time. The launcher exits with 1: another agent would wait in vain."""
