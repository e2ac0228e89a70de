"""Wraps Megatron-core behind plain interfaces; no other folder imports megatron.

Call `process_groups.start(device)` before importing any other module here: it installs the CPU adaptations if no GPU
was chosen (`cpu`, `process_groups` and this package do not import megatron at load time).
"""
