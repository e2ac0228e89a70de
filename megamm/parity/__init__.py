"""The parity harness: any layout against one rank, from the same weights and the same global batch, in float32."""
