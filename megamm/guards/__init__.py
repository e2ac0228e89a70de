"""Guards of a run's numbers: bad losses, stragglers, reruns, and the roll-back they may cause."""
