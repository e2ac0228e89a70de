"""The visual tokenizer of images and videos: model, training and figures."""
