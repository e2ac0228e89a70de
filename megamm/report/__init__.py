"""What a run did, as one HTML page: plots, time line, tables."""
