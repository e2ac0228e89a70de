"""What a run reports: metrics, goodput, restarts, pages; and the simulation of failures."""
