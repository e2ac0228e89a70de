"""A run that begins with other weights: `start_from` in the config (docs/starting.md).

    source.py      what is started from: a checkpoint, or a Hugging Face folder (convert/hf_source.py)
    vocabulary.py  ranges of ids: what is kept, moved, new, left out
    rules.py       tensors: what is loaded, new, left out
    draw.py        values of what is new, the same at every layout
    begin.py       the whole, on every rank

Used only where the run has no checkpoint of its own: a resume is exact and changes no shape.
"""
