"""Using an export: evaluation and generation."""
