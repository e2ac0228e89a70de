"""The points tokenizer of 3D clouds and meshes: model and training."""
