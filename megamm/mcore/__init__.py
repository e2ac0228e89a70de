"""Megatron-core behind plain interfaces; no other folder imports megatron.

`setup(device)` must run before any other module here imports megatron: it installs the CPU
adaptations when no GPU was chosen. Importing this package itself does no work.
"""
