"""Converts a run's checkpoint to a Hugging Face folder and back."""
