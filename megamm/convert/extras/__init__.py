"""Other forms of an export: parts, quantised weights, GGUF, the model card."""
