"""megamm: pretraining of any-to-any multimodal models on Megatron-core, from a laptop CPU to a cluster."""

__version__ = "0.2.0"
