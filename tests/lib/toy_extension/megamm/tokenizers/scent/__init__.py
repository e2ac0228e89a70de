"""The tokenizer of scents: a code for each letter."""
