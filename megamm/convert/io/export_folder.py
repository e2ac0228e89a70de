"""The files of an export other than its weights, and opening an export for use.

    megamm.json     vocabulary ranges, run config, step and versions, which import needs, and the card's training data
    tokenizer.json  the text tokenizer plus one special token for every control and media id, in id order: stock engines
                    print `<|image_start|><|image_17|>...` and read it back to the same ids
    SHA256SUMS      a digest of every file; check it with `sha256sum -c SHA256SUMS` in the folder. One line per file,
                    `<64 hex digits>  <path from the folder>`, sorted by path; the file does not list itself

Generation and evaluation see a model only through `open_export`, so their results are what any engine gets from the
export, the folder that `megamm convert export` makes.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer

from megamm.checkpoint import TrainState
from megamm.common.errors import UserError
from megamm.common.sample import Document, Row
from megamm.config import RunConfig, config_from_dict
from megamm.convert.io.safetensors_files import Weights
from megamm.convert.io.unused import unused
from megamm.data.pipeline.packing import pack
from megamm.data.pipeline.run_data import load_modalities, packing_specs, vocabulary_of
from megamm.modalities.protocol import Modality
from megamm.model.vocabulary import Vocabulary
from megamm.tokenizers.io import INDEX, weight_files

log = logging.getLogger(__name__)
METADATA = "megamm.json"
DIGESTS = "SHA256SUMS"
_REMEDY = "create the export again with `megamm convert export`"


def metadata_of(state: TrainState, training: dict[str, Any]) -> dict[str, Any]:
    """Return the contents for an export of a checkpoint; training: from card.record."""
    kept = {"vocabulary": state.vocabulary, "config": state.config, "step": state.step, "versions": state.versions}
    return kept | {"training": training}


def read_metadata(export_folder: Path) -> tuple[RunConfig, Vocabulary, dict[str, Any]]:
    """Read run config, vocabulary and all keys of an export's megamm.json; codec paths point into the export."""
    try:
        metadata = json.loads((export_folder / METADATA).read_text())
        config = config_from_dict(metadata["config"], where=export_folder / METADATA)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"not an export of megamm: {error}",
            where=export_folder,
            remedy="create one with `megamm convert export`; to start from other folders use init_from.checkpoint",
        ) from None
    inside = {name: export_folder / "codecs" / name for name in config.tokenizers}
    return config.model_copy(update={"tokenizers": inside}), Vocabulary.from_json(metadata["vocabulary"]), metadata


def copy_without_weights(source: Path, target: Path) -> None:
    """Copy all files of an export except its weights and its digests into the folder `target`."""
    skipped = {file.name for file in weight_files(source)} | {INDEX, DIGESTS}
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=lambda at, _: skipped if Path(at) == source else ())


def special_tokens(vocabulary: Vocabulary) -> list[str]:
    """Names of all ids after the text range."""
    names = []
    for part in vocabulary.ranges:
        if part.name == "control":
            names += [vocabulary.control_name(token) for token in range(part.start, part.stop)]
        elif part.name != "text":
            names += [f"<|{part.name}_{i}|>" for i in range(part.size)]
    return names


def export_tokenizer(text_codec: Path, vocabulary: Vocabulary, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises UserError if the text tokenizer cannot be extended."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = text_codec / "tokenizer.json"
    if file.exists():
        tokenizer = Tokenizer.from_file(str(file))
    else:
        tokenizer = AutoTokenizer.from_pretrained(text_codec, local_files_only=True).backend_tokenizer
    if tokenizer.get_vocab_size(with_added_tokens=True) != vocabulary["text"].size:
        what = "the text tokenizer does not match the run's vocabulary"
        raise UserError(what, where=text_codec, remedy="restore the run's tokenizer")
    names = special_tokens(vocabulary)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    start = vocabulary["control"].start
    assert tokenizer.token_to_id(names[0]) == start and tokenizer.token_to_id(names[-1]) == vocabulary.size - 1
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocabulary.control_name(vocabulary.document_start),
        eos_token=vocabulary.control_name(vocabulary.document_end),
        pad_token=vocabulary.control_name(vocabulary.padding),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def copy_tokenizer(text_codec: Path, folder: Path, size: int) -> dict[str, int]:
    """Write the text tokenizer unchanged, for a vocabulary of `size` text ids; returns its bos/eos/pad token ids.

    Token ids without a row in the model, which the tokenizer class may add, are skipped."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_codec, local_files_only=True, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {name: token for name, token in ids.items() if token is not None and token < size}


def write_digests(folder: Path) -> Path:
    """Write folder/SHA256SUMS over all files below the folder, replacing an older one; returns its path."""
    lines = [f"{digest}  {name}\n" for name, digest in _sha256(folder, _files(folder))]
    partial = folder / f".{DIGESTS}.partial"
    partial.write_text("".join(lines), encoding="utf-8")
    return partial.replace(folder / DIGESTS)


def check_digests(folder: Path) -> None:
    """Raise UserError for the first missing, unlisted or changed file, or if SHA256SUMS is not readable."""
    listed = _read_digests(folder)
    found = set(_files(folder))
    if missing := sorted(listed.keys() - found):
        raise UserError(f"{missing[0]} is missing", where=folder, remedy="copy or create the folder again")
    for name, digest in _sha256(folder, listed):
        if listed[name] != digest:
            raise UserError(f"{name} does not match {DIGESTS}", where=folder, remedy="copy or create the folder again")
    if unlisted := sorted(found - listed.keys()):
        remedy = "remove it, or create the folder again"
        raise UserError(f"{DIGESTS} does not list {unlisted[0]}", where=folder, remedy=remedy)


def _read_digests(folder: Path) -> dict[str, str]:
    try:
        text = (folder / DIGESTS).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {DIGESTS}: {error}", where=folder, remedy="create the folder again") from None
    listed = {}
    for number, line in enumerate(text.splitlines(), 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if not name or gap != "  " or set(digest) - set("0123456789abcdef"):
            raise UserError(f"line {number} is not a digest", where=folder / DIGESTS, remedy="create the folder again")
        listed[name] = digest
    return listed


def _files(folder: Path) -> list[str]:
    """Paths of all regular files below the folder, except the digests."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in files if name != DIGESTS and not name.startswith(f".{DIGESTS}"))


def _sha256(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and digests, in the given order; files are hashed in parallel, one thread per core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda name: (name, _digest(folder / name)), names)


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


@dataclass(frozen=True)
class LoadedExport:
    """An open export; `step` is the training step of its weights. The weights are read on first use of `model`."""

    folder: Path
    config: RunConfig
    vocabulary: Vocabulary
    modalities: dict[str, Modality]
    step: int
    device: torch.device

    @cached_property
    def model(self) -> Any:
        """The transformers model, in eval mode on the device. Raises UserError if weights are missing or do not fit."""
        model = load_stock(self.folder)
        log.info("%s from step %d on %s, %s", type(model).__name__, self.step, self.device, model.dtype)
        return model.to(self.device)

    def row(self, document: Document, length: int) -> Row:
        """One document as in training, padded to `length` tokens."""
        return pack([document], self.vocabulary, length, packing_specs(self.modalities, length))


def load_stock(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of any transformers folder, in eval mode on the CPU; dtype None: the stored dtype.

    Raises UserError if weights are missing or do not fit.
    """
    from transformers import AutoModelForCausalLM  # seconds to import
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=dtype or "auto"
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"transformers cannot load it: {reason}", where=folder, remedy=_REMEDY) from error
    model, found = loaded
    # transformers would continue with random weights in place of missing ones.
    unexpected = set(map(str, found["unexpected_keys"]))
    # transformers may have joined tensors of the files (experts) under another name in the same layer.
    unexpected -= Weights(folder, used_only=True).unused.keys() | unused(folder, ((n, (1,)) for n in unexpected)).keys()
    wrong = sorted(set(map(str, found["missing_keys"])) | unexpected)
    if wrong:
        what = f"{len(wrong)} tensors are missing or unknown, the first is {wrong[0]}"
        raise UserError(what, where=folder, remedy=_REMEDY)
    return model.eval()


def open_export(folder: Path, device: torch.device) -> LoadedExport:
    """Open an export with its own codecs. Raises UserError if it is not an export, or a codec was exchanged."""
    config, vocabulary, metadata = read_metadata(folder)
    modalities = load_modalities(config.tokenizers, device)
    if vocabulary_of(modalities) != vocabulary:
        raise UserError("the codecs do not match the model's vocabulary", where=folder / "codecs", remedy=_REMEDY)
    return LoadedExport(folder, config, vocabulary, modalities, metadata["step"], device)
