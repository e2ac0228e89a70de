"""`megamm plan`: finds parallel layouts that fit the GPUs and predicts their step time; nothing here needs a GPU."""
