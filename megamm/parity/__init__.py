"""The parity harness: compares any layout with one rank, with the same weights and global batch, in float32.

The one rank uses plain torch; the layouts use the compiled operators of csrc/ if they are built.
"""
