"""The parity harness: any layout against one rank, from the same weights and the same global batch, in float32.

The one rank computes with plain torch, the layouts with the compiled operators of csrc/ where those are built.
"""
