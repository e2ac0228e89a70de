"""The DeepSpeed engine: ZeRO with data parallelism only, for networks too slow for tensor or pipeline parallelism."""
