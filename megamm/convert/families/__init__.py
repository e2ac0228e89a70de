"""The transformers families that our backbone can express, as tables."""
