"""The tokenizers behind the modalities: quantisers, autoencoders (codecs) and their training."""
