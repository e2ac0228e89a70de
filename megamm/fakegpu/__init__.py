"""Runs the GPU path of training without a GPU, with tensors that have no memory, and counts what it does."""
