"""Start a run from existing weights: `init_from` in the config (docs/starting.md).

    init_from/source.py      the source of the weights: a checkpoint, or a Hugging Face folder (convert/io/hf_source.py)
    init_from/vocabulary_rows.py  ranges of ids: kept, moved, new or dropped
    init_from/rules.py       tensors: loaded, new or skipped
    init_from/new_rows.py        values of new rows and tensors, identical at every parallel layout
    init_from/initialize.py       the whole start, on every rank

It is used only if the run has no checkpoint of its own: a resume is exact and changes no shape.
"""
