"""Reading and writing of what conversions take and make: tensors, tokenizers, digests, exports."""
