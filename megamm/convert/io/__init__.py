"""Input and output of conversions: weights in files and checkpoints, dtypes, the files of an export."""
