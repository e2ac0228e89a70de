"""Checks of conversions and of weights: equivalence with the source, shapes, logits, NaN and Inf."""
