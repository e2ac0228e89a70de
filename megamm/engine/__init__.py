"""The engines that compute gradients and update weights: native (Megatron-core) and DeepSpeed."""
