"""Raw files to training rows: sources -> shards -> mixture -> packing -> loader."""
