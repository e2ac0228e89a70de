"""Evaluation of a model by the field's metrics: suites, metrics and their results."""
