"""Checks of conversions: shapes, bits, logits, weights."""
