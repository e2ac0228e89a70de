"""The parts of the any-to-any model that do not depend on Megatron: the vocabulary, rotary positions, sizes."""
