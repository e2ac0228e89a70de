"""Indexed datasets, written by us, and a text modality for them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from megamm.modalities.text import TextModality
from megamm.shards.indexed_dataset import IndexedTokensWriter

END = "<|endoftext|>"
END_ID = 99
"""The end-of-text token of the text modality here, the last of its 100 ids."""


Documents = Sequence[Sequence[Sequence[int]]]
"""The sequences of each document."""


def write_bin(prefix: Path, documents: Documents, dtype: str = "<i4") -> Path:
    """Write PREFIX.bin and PREFIX.idx with our writer."""
    with IndexedTokensWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add([np.array(ids, dtype=np.int64) for ids in sequences])
    return prefix


def text_modality() -> TextModality:
    """Return one of 100 ids: 0 to 98, and the end of text."""
    ids = {str(i): i for i in range(END_ID)} | {END: END_ID}
    return TextModality(Tokenizer(models.WordLevel(ids, unk_token="0")), "t")
