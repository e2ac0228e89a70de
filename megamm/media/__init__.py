"""Media files: bytes to arrays, sampled for the tokenizers, and back; untrusted input throughout."""
