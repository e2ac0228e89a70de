"""Trains the text tokenizer: byte-level BPE, saved as a Hugging Face tokenizer folder.

Every byte is a token, so any string survives the round trip and no token is unknown. Reads the train split only.
Sources: Sennrich et al. 2016 (BPE), Radford et al. 2019 (byte level, GPT-2's split into words).
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.text_file import to_text
from megamm.tokenizers.io import Split, new_folder, open_media
from megamm.tokenizers.text.model import load_tokenizer
from megamm.tokenizers.text.model import vocabulary_size as size_of

logger = logging.getLogger(__name__)

BYTES = 256
"""The smallest vocabulary: one token per byte, without merges."""


def train_text_tokenizer(sources: list[Path], target: Path, *, vocabulary_size: int = 4096) -> dict[str, float]:
    """Train on `sources` and write the folder `target`; returns and writes (training.json) its statistics.

    bytes_per_token is measured on held-out text. Raises UserError if there is no text or the target exists.
    """
    if vocabulary_size < BYTES:
        what = f"vocabulary_size {vocabulary_size} is too small"
        raise UserError(what, remedy=f"use at least {BYTES}: one token for each byte")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    with new_folder(target) as folder:
        tokenizer.train_from_iterator(_texts(sources, "train"), trainer)
        if tokenizer.get_vocab_size() < vocabulary_size:
            logger.warning("only %d of %d tokens: too little text", tokenizer.get_vocab_size(), vocabulary_size)
        _save(tokenizer, folder)
        statistics = _statistics(load_tokenizer(folder)[0], sources)
        (folder / "training.json").write_text(json.dumps(statistics, indent=2) + "\n")
    return statistics


def _texts(sources: list[Path], split: Split) -> Iterator[str]:
    """Every text of a split, in shard order. Raises UserError for an unreadable one."""
    for shards in open_media(sources, split, "text"):
        for i in range(len(shards)):
            try:
                yield to_text(shards.read(i))
            except UnreadableMedia as error:
                remedy = "rebuild these shards with `megamm data build`, which skips such samples"
                raise UserError(f"sample {shards.keys[i]}: {error}", where=shards.folder, remedy=remedy) from error


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and a config with which transformers loads it without changing any text."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    wrapped.save_pretrained(folder)


def _statistics(tokenizer: Tokenizer, sources: list[Path]) -> dict[str, float]:
    texts = list(_texts(sources, "heldout"))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    size = sum(len(t.encode()) for t in texts)
    return {"vocabulary_size": size_of(tokenizer), "heldout_texts": len(texts), "bytes_per_token": size / tokens}
