"""Megatron-core behind plain interfaces; no other folder imports megatron.

`groups.start(device)` must run before any other module here is imported: it installs the CPU adaptations
when no GPU was chosen (`cpu`, `groups` and this package import no megatron themselves).
"""
