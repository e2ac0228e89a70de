"""The text tokenizer: reading a folder, and training byte-level BPE."""
