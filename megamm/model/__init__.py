"""What is specific to the any-to-any model and independent of Megatron: the vocabulary, rotary positions."""
