"""The data path from raw files to training rows: sources -> shards -> mixture -> packing -> loader."""
