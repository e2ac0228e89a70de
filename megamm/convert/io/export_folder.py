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

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, processors

from megamm.checkpoint import TrainState
from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL, Document, IntArray, Part, Row
from megamm.config import RunConfig, config_from_dict
from megamm.convert.io.origin import ChatTemplate, read_chat_template, read_origin
from megamm.convert.io.safetensors_files import Weights
from megamm.convert.io.unused import unused
from megamm.data.pipeline.packing import DOCUMENT_MARKS, document_length, pack
from megamm.data.pipeline.run_data import load_modalities, packing_specs, vocabulary_of
from megamm.modalities.protocol import Modality
from megamm.model.vocabulary import DOCUMENT_START, Vocabulary
from megamm.tokenizers.io import INDEX, weight_files

log = logging.getLogger(__name__)
METADATA = "megamm.json"
DIGESTS = "SHA256SUMS"
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
_TOKENIZER_FILES |= {"vocab.json", "merges.txt", "vocab.txt", "tekken.json"}
_TOKENIZER_FILES |= {"chat_template.jinja", "chat_template.json", "additional_chat_templates"}
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


def export_tokenizer(
    text_codec: Path, vocabulary: Vocabulary, folder: Path, chat_template: ChatTemplate | None = None
) -> None:
    """Write tokenizer.json and tokenizer_config.json: the export's tokenizer gives the prompts of training.

    chat_template: used if the text tokenizer's folder has none. Raises UserError if the tokenizer cannot be extended.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = text_codec / "tokenizer.json"
    if file.exists():
        tokenizer = Tokenizer.from_file(str(file))
    else:
        tokenizer = AutoTokenizer.from_pretrained(text_codec, local_files_only=True).backend_tokenizer
    if tokenizer.get_vocab_size(with_added_tokens=True) != vocabulary["text"].size:
        what = "the text tokenizer does not match the run's vocabulary"
        raise UserError(what, where=text_codec, remedy="restore the run's tokenizer")
    names = vocabulary.names_after_text()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    start = vocabulary["control"].start
    assert tokenizer.token_to_id(names[0]) == start and tokenizer.token_to_id(names[-1]) == vocabulary.size - 1
    _set_prompt_form(tokenizer, names[DOCUMENT_START], vocabulary.document_start)
    extended = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocabulary.control_name(vocabulary.document_start),
        eos_token=vocabulary.control_name(vocabulary.document_end),
        pad_token=vocabulary.control_name(vocabulary.padding),
        clean_up_tokenization_spaces=False,
        padding_side="left",  # a prompt ends where generation starts
    )
    extended.chat_template = read_chat_template(text_codec) or chat_template
    extended.save_pretrained(folder)


def _set_prompt_form(tokenizer: Tokenizer, start: str, start_id: int) -> None:
    """Make `tokenizer(text)` give <|document_start|> and the ids of the text, as packing.py renders a document.

    A template of the text tokenizer, such as Llama's <|begin_of_text|>, was not used in training: it is replaced, and
    so are limits of length.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    template = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, start_id)]
    )
    before = json.loads(tokenizer.to_str())["post_processor"] or {}
    is_by_bytes = "ByteLevel" in {before.get("type"), *(step["type"] for step in before.get("processors", ()))}
    # ByteLevel trims the spaces from offsets and changes no id.
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template]) if is_by_bytes else template


def surplus_tokens(tokenizer: Tokenizer, rows: int) -> dict[int, str]:
    """Added tokens whose ids have no row in a table of `rows` rows; empty if other tokens have none either."""
    added = {id_: token.content for id_, token in tokenizer.get_added_tokens_decoder().items() if id_ >= rows}
    beyond = {id_ for id_ in tokenizer.get_vocab(with_added_tokens=True).values() if id_ >= rows}
    return dict(sorted(added.items())) if beyond == added.keys() else {}


def copy_tokenizer(
    text_codec: Path, folder: Path, size: int, chat_template: ChatTemplate | None = None
) -> dict[str, int]:
    """Write the text tokenizer of a model without control ids; returns its bos/eos/pad token ids.

    size: text ids of the vocabulary; added tokens beyond them are left out. chat_template: see export_tokenizer.
    """
    from transformers import AutoTokenizer

    for path in text_codec.iterdir():
        if path.name in _TOKENIZER_FILES or path.suffix in (".model", ".tiktoken"):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    if not (folder / "tokenizer.json").is_file():  # which other engines read
        AutoTokenizer.from_pretrained(text_codec, local_files_only=True, trust_remote_code=False).save_pretrained(
            folder
        )
    _remove_tokens(folder, size)
    if chat_template is not None and read_chat_template(folder) is None:
        named = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        for name, template in named.items():
            file = f"additional_chat_templates/{name}.jinja" if name != "default" else "chat_template.jinja"
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(template, encoding="utf-8")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return {}  # tokenizer.json alone names no special tokens
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {name: token for name, token in ids.items() if token is not None and token < size}


def _remove_tokens(folder: Path, size: int) -> None:
    """Remove the added tokens with ids from `size` on from the tokenizer files of a folder."""
    file = folder / "tokenizer.json"
    surplus = surplus_tokens(Tokenizer.from_file(str(file)), size)
    if not surplus:
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] not in surplus]
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            kept = _without(json.loads((folder / name).read_text(encoding="utf-8")), set(surplus.values()), size)
            (folder / name).write_text(json.dumps(kept, ensure_ascii=False, indent=2), encoding="utf-8")
    log.warning("%s: tokens left out, as the model has no row for them: %s", folder, ", ".join(surplus.values()))


def _without(value: Any, tokens: set[str], size: int) -> Any:
    """A JSON value of a tokenizer's config without these tokens, by name or id (added_tokens_decoder)."""

    def is_kept(entry: Any, key: str = "") -> bool:
        content = entry.get("content") if isinstance(entry, dict) else entry
        is_named = isinstance(content, str) and content in tokens
        return not (is_named or key in tokens or (key.isdigit() and int(key) >= size))

    if isinstance(value, dict):
        return {key: _without(entry, tokens, size) for key, entry in value.items() if is_kept(entry, key)}
    return [_without(entry, tokens, size) for entry in value if is_kept(entry)] if isinstance(value, list) else value


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
class PromptForm:
    """The ids around a document: `start` before its first part, `ends` after its last one, and `padding` of a batch."""

    start: tuple[int, ...]
    ends: tuple[int, ...]
    padding: int


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
        # Otherwise `generate` takes over every setting that its caller leaves out, such as a penalty for repetitions.
        model.generation_config = type(model.generation_config)()
        return model.to(self.device)

    @cached_property
    def prompt_form(self) -> PromptForm:
        """The form of training; for an imported model without control ids, that of its own tokenizer and settings."""
        v = self.vocabulary
        if v.has_control:
            return PromptForm((v.document_start,), (v.document_end,), v.padding)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        read = tokenizer("a", return_special_tokens_mask=True)
        before = next(i for i, is_special in enumerate(read.special_tokens_mask) if not is_special)
        if before > DOCUMENT_MARKS:
            what = f"the tokenizer puts {before} ids in front of a text, the most is {DOCUMENT_MARKS}"
            raise UserError(what, where=self.folder, remedy="change the post_processor of its tokenizer.json")
        ends = read_origin(self.folder, v, v.size).ends()
        if not ends and tokenizer.eos_token_id is not None:
            ends = [tokenizer.eos_token_id]
        ends = [end for end in ends if 0 <= end < self.model.config.vocab_size]
        # Padding is masked, so any id serves.
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return PromptForm(tuple(read.input_ids[:before]), tuple(ends), padding)

    @cached_property
    def longest(self) -> int:
        """Most tokens of a row: as in training; for an imported model without control ids, what its config allows."""
        trained = self.config.data.seq_length
        if self.vocabulary.has_control:
            return trained
        from transformers import AutoConfig

        theirs = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        return max(trained, getattr(theirs.get_text_config(), "max_position_embeddings", None) or 0)

    def prompt(self, *parts: Part) -> IntArray:
        """The ids `[T]` of a document's first parts, as in training."""
        if self.vocabulary.has_control:
            length = document_length(*((part.modality, len(part.ids)) for part in parts))
            return self.row(Document("prompt", parts), length).input_ids[:-1]
        ids = np.concatenate([np.array(self.prompt_form.start, dtype=np.int64), *(part.ids for part in parts)])
        if not ids.size:
            raise UserError("the prompt is empty", where=self.folder, remedy="give a text of at least one token")
        if ids.max() >= self.vocabulary.size:
            what = f"token id {ids.max()} has no row in the model, which has {self.vocabulary.size}"
            raise UserError(what, where=self.folder, remedy="remove this token from the text")
        return ids

    def prompt_spans(self, *parts: Part) -> IntArray:
        """The span of each id of `prompt`, `[T]`, -1 for none."""
        ids = self.prompt(*parts)
        return self.row(Document("prompt", parts), len(ids) + 1).span[: len(ids)]

    def row(self, document: Document, length: int) -> Row:
        """One document as in training, padded to `length` tokens.

        Without control ids every id counts as a label except those in front of the text.
        """
        if self.vocabulary.has_control:
            return pack([document], self.vocabulary, length, packing_specs(self.modalities, length, self.config.spans))
        ids = self.prompt(*document.parts)
        row = Row(
            input_ids=np.full(length, self.prompt_form.padding, dtype=np.int64),
            labels=np.full(length, IGNORE_LABEL, dtype=np.int64),
            loss_weight=np.zeros(length, dtype=np.float32),
            segment=np.full(length, -1, dtype=np.int64),
            position=np.zeros((3, length), dtype=np.int64),
            modality=np.full(length, -1, dtype=np.int64),
            span=np.full(length, -1, dtype=np.int64),
        )
        row.input_ids[: ids.size], row.segment[: ids.size] = ids, 0
        row.position[:, : ids.size] = np.arange(ids.size)
        first = max(1, len(self.prompt_form.start))  # the index of the first id that is a label
        row.labels[first - 1 : ids.size - 1] = ids[first:]
        row.modality[first - 1 : ids.size - 1], row.loss_weight[first - 1 : ids.size - 1] = 0, 1.0
        return row


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
    if not vocabulary.has_control:  # imported from a plain folder, whose tokenizer may have tokens without a row
        text, ours = vocabulary_of(modalities)["text"], vocabulary["text"]
        does_match = text.codec_id == ours.codec_id and text.size >= ours.size
    else:
        does_match = vocabulary_of(modalities) == vocabulary
    if not does_match:
        raise UserError("the codecs do not match the model's vocabulary", where=folder / "codecs", remedy=_REMEDY)
    return LoadedExport(folder, config, vocabulary, modalities, metadata["step"], device)
