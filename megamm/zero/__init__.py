"""The DeepSpeed engine: ZeRO over data parallel only, for networks too slow for tensor or pipeline parallel."""
