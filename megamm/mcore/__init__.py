"""Wraps Megatron-core behind plain interfaces; no other folder imports megatron.

Call `groups.start(device)` before importing any other module here: it installs the CPU adaptations if no GPU was chosen
(`cpu`, `groups` and this package do not import megatron at load time).
"""
