"""From token caches to batches: documents, mixture, packing, rows, loader."""
