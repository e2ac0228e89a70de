"""Start a run from existing weights: `start_from` in the config (docs/starting.md).

    source.py      the source of the weights: a checkpoint, or a Hugging Face folder (convert/hf_source.py)
    vocabulary.py  ranges of ids: kept, moved, new or dropped
    rules.py       tensors: loaded, new or skipped
    draw.py        values of new rows and tensors, identical at every parallel layout
    begin.py       the whole start, on every rank

It is used only if the run has no checkpoint of its own: a resume is exact and changes no shape.
"""
