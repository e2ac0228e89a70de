"""Shards: aligned WebDataset tar files with an index beside each, and token caches."""
