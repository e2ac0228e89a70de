"""Pretrained tokenizers of transformers, behind the interface of our own."""
