"""The trainable tokenizers (codecs) behind the modalities: quantisers, autoencoders and their training."""
