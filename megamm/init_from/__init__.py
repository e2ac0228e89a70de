"""Start a run from existing weights: `init_from` in the config (docs/starting.md).

    init_from/initialize.py  the whole start, on every rank
    init_from/source.py      the source of the weights: a checkpoint, or a Hugging Face folder (convert/io/hf_source.py)
    init_from/rules.py       tensors: loaded, new or ignored; ranges of ids: kept, moved, new or dropped
    init_from/new_rows.py    values of new rows and tensors, identical at every parallel layout

It is used only if the run has no checkpoint of its own: a resume is exact and changes no shape.
"""
