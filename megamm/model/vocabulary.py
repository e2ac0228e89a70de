"""One vocabulary for all modalities: [text | control | visual | audio | points], contiguous ranges.

A range holds the ids of one codec; image and video share the visual one. The ranges are recorded in checkpoints and
exports. CONTROL_SIZE slots are reserved, so that a modality added later (its begin and end marks are control tokens)
shifts no other id. Padding for tensor parallelism is not included (`padded_vocabulary` in layout.py).
"""

from dataclasses import asdict, dataclass
from typing import Any

from megamm.common.errors import UserError
from megamm.modalities import REGISTRY

CONTROL_SIZE = 32
DOCUMENT_START, DOCUMENT_END, PADDING = 0, 1, 2
"""Offsets in the control range; media number m of the registry (0 = image) starts with 3 + 2m and ends with 4 + 2m."""


@dataclass(frozen=True)
class Range:
    """Ids [start, start + size) of the codec `codec_id`, and its modalities (for control: "" and none)."""

    name: str
    start: int
    size: int
    codec_id: str = ""
    modalities: tuple[str, ...] = ()

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Vocabulary:
    """The ranges in id order: text, control, then the media. Build it with `Vocabulary.of`."""

    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, codecs: dict[str, tuple[int, str]]) -> "Vocabulary":
        """Build it from modality name -> (vocabulary_size, codec_id); "text" is required."""
        if "text" not in codecs:
            raise UserError("no text tokenizer", remedy="set tokenizers.text in the config")
        by_tokenizer: dict[str, list[str]] = {"text": [], "control": []}
        for name in REGISTRY:
            if name in codecs:
                by_tokenizer.setdefault(REGISTRY[name].tokenizer_name, []).append(name)
        ranges, start = [], 0
        for tokenizer, names in by_tokenizer.items():
            size, codec_id = codecs[names[0]] if names else (CONTROL_SIZE, "")
            assert all(codecs[name] == (size, codec_id) for name in names), "modalities of one tokenizer share its ids"
            ranges.append(Range(tokenizer, start, size, codec_id, tuple(names)))
            start += size
        return cls(tuple(ranges))

    @property
    def size(self) -> int:
        return self.ranges[-1].stop

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modality names in the registry's order; their index is `Row.modality`."""
        names = {name for part in self.ranges for name in part.modalities}
        return tuple(name for name in REGISTRY if name in names)

    def __getitem__(self, name: str) -> Range:
        """The range of a modality, or "control"."""
        return next(r for r in self.ranges if name in r.modalities or (name == r.name == "control"))

    def begin(self, modality: str) -> int:
        """Id of the mark before a part of this media modality (text has none)."""
        return self["control"].start + 3 + 2 * _media().index(modality)

    def end(self, modality: str) -> int:
        """Id of the mark after a part of this media modality."""
        return self.begin(modality) + 1

    @property
    def has_control(self) -> bool:
        """Whether it has control ids; a model imported from a plain Hugging Face folder has text ids only."""
        return any(part.name == "control" for part in self.ranges)

    @property
    def document_start(self) -> int:
        return self["control"].start + DOCUMENT_START

    @property
    def document_end(self) -> int:
        return self["control"].start + DOCUMENT_END

    @property
    def padding(self) -> int:
        return self["control"].start + PADDING

    def control_name(self, token: int) -> str:
        """Name of a control token, as it appears in an exported tokenizer."""
        offset = token - self["control"].start
        named = {DOCUMENT_START: "document_start", DOCUMENT_END: "document_end", PADDING: "padding"}
        for m, media in enumerate(_media()):
            named[3 + 2 * m], named[4 + 2 * m] = f"{media}_start", f"{media}_end"
        return f"<|{named.get(offset, f'reserved_{offset}')}|>"

    def names_after_text(self) -> list[str]:
        """Names of all ids after the text range, in id order, as they appear in an exported tokenizer."""
        names: list[str] = []
        for part in self.ranges:
            if part.name == "control":
                names += [self.control_name(token) for token in range(part.start, part.stop)]
            elif part.name != "text":
                names += [f"<|{part.name}_{i}|>" for i in range(part.size)]
        return names

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(r) | {"modalities": list(r.modalities)} for r in self.ranges]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> "Vocabulary":
        return cls(tuple(Range(**r | {"modalities": tuple(r["modalities"])}) for r in data))


def _media() -> list[str]:
    """The modalities with marks. The registry's order is part of the format: only append to it."""
    return [name for name in REGISTRY if name != "text"]
