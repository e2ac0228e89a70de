"""Report of a run as one HTML page: plots, time line, tables."""
