"""Tokenizing the media of shards once, into token caches."""
