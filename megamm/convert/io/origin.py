"""What a model's Hugging Face folder says about its use: read by an import or `init_from`, written by every export.

    config.json                  token ids, max_position_embeddings, keys that our backbone does not have
    generation_config.json       where generation stops, sampling settings; every key, unchanged
    chat template                chat_template.jinja, or in tokenizer_config.json or chat_template.json
    rows                         of the embedding: it can have more than its tokenizer has ids

Weights do not tell any of it, so it travels in the checkpoint: `TrainState.origin` is `Origin.to_json()`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError
from megamm.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)
GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_TOKENS = ("_token_id", "_tokens", "_words_ids", "_decoder_ids", "sequence_bias")
"""Ends of the names of generation settings that hold token ids."""
ChatTemplate = str | dict[str, str]
"""A Jinja template, or several by name."""


@dataclass(frozen=True)
class Origin:
    """The folder that a model's weights came from. codec_id: of its text tokenizer, whose ids the others are."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    chat_template: ChatTemplate | None
    rows: int
    codec_id: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> "Origin | None":
        """The inverse of `to_json`; None for a checkpoint whose weights came from nowhere else."""
        return None if values is None else cls(**values)

    def ends(self) -> list[int]:
        """Ids at which generation stops."""
        return ends_of(self.generation, self.config)


def ends_of(generation: Mapping[str, Any], config: Mapping[str, Any], where: Path | None = None) -> list[int]:
    """Ids at which generation stops, as in generation_config.json, or else in config.json.

    where: their folder, for the UserError about a value that is not an id or a list of ids.
    """
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(id_) is not int for id_ in ids):
        file = GENERATION if "eos_token_id" in generation else "config.json"
        what, remedy = f"eos_token_id = {found!r} in {file}", "give a token id, or a list of token ids"
        raise UserError(what, where=where, remedy=remedy)
    return list(ids)


def read_origin(folder: Path, vocabulary: Vocabulary, rows: int) -> Origin:
    """Read a folder with a valid config.json. Raises UserError if another of its files is damaged."""
    config, generation = _read(folder / "config.json"), _generation(folder)
    ends_of(generation, config, folder)
    return Origin(config, generation, read_chat_template(folder), rows, vocabulary["text"].codec_id)


def _generation(folder: Path) -> dict[str, Any]:
    """All settings of generation_config.json; without that file, those of config.json, as in older folders."""
    if (folder / GENERATION).is_file():
        return _read(folder / GENERATION)
    from transformers import AutoConfig, GenerationConfig

    theirs = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    of_model = {field.name for field in fields(theirs)} - {*SPECIAL, "use_cache"}
    names = GenerationConfig().to_dict().keys() - of_model - {"transformers_version"}
    return {key: value for key, value in _read(folder / "config.json").items() if key in names and value is not None}


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a tokenizer's folder, from any of the files in which transformers stores it."""
    found: dict[str, str] = {}
    for name in ("chat_template.json", "tokenizer_config.json"):  # the later ones replace the earlier ones
        given = _read(folder / name).get("chat_template") if (folder / name).is_file() else None
        found |= {"default": given} if isinstance(given, str) else {}
        found |= {one["name"]: one["template"] for one in given} if isinstance(given, list) else {}
        found |= given if isinstance(given, dict) else {}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found |= {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    return found.get("default") if found.keys() <= {"default"} else found


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"unreadable: {error}", where=file, remedy="download or copy the file again") from None


def special_ids(vocabulary: Vocabulary, origin: Origin | None) -> dict[str, Any]:
    """The bos, eos and pad ids for the config.json of an export with control ids.

    A document ends with <|document_end|>; generation also stops where the origin stops.
    """
    text = vocabulary["text"]
    is_same_text = origin is not None and origin.codec_id == text.codec_id
    ends = [end for end in origin.ends() if 0 <= end < text.size] if origin is not None and is_same_text else []
    eos = [vocabulary.document_end, *ends] if ends else vocabulary.document_end
    return dict(zip(SPECIAL, (vocabulary.document_start, eos, vocabulary.padding), strict=True))


def plain_ids(origin: Origin, of_tokenizer: Mapping[str, int], rows: int) -> dict[str, Any]:
    """The bos, eos and pad ids for the config.json of a model without control ids: the origin's own.

    of_tokenizer: for keys that the origin's config.json lacks. Ids without a row are dropped.
    """
    given = {key: origin.config.get(key, of_tokenizer.get(key)) for key in SPECIAL}
    return {key: _with_rows(value, rows) for key, value in given.items()}


def _with_rows(value: int | Sequence[int] | None, rows: int) -> int | list[int] | None:
    if value is None or isinstance(value, int):
        return value if value is None or value < rows else None
    return [token for token in value if token < rows] or None


def generation_settings(origin: Origin | None, vocabulary: Vocabulary, special: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of an export's generation_config.json.

    With control ids the special ids are those of config.json. A setting with ids of another tokenizer is dropped.
    """
    if origin is None:
        return dict(special)
    settings = dict(origin.generation)
    if not vocabulary.has_control:
        return settings or dict(special)
    if origin.codec_id != vocabulary["text"].codec_id:
        dropped = sorted(key for key in settings if key.endswith(_OF_TOKENS) and key not in SPECIAL)
        if dropped:
            log.warning("%s: dropped %s: ids of another tokenizer", GENERATION, ", ".join(dropped))
        settings = {key: value for key, value in settings.items() if key not in dropped}
    return {**settings, **special}
