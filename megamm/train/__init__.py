"""Training: the loop from top to bottom, checkpoints of a run, and the dry run."""
