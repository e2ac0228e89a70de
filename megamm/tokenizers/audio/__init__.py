"""The audio tokenizer: model, training and figures."""
