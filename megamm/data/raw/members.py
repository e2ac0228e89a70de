"""Combines files that belong together, such as cat.png, cat.txt and cat.json, into one sample.

In: the members of a sample by extension. Out: a `RawSample`. The extension decides the modality. The text is the .txt
file, else "caption" or "text" of a .json file (which may also give "noun"), else the .cls file. Numbered extensions
(0.txt, 1.png) make an interleaved sample. Unknown extensions are ignored and reported.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from megamm.data.raw.samples import ByteRange, RawPart, RawSample, UnusableSample, sample_of
from megamm.modalities import REGISTRY

TEXT_EXTENSIONS = ("txt", "json", "cls")
MAX_TEXT_BYTES = 16 * 2**20
ALIASES = {"jpeg": "jpg", "jpe": "jpg", "wave": "wav", "oga": "ogg", "m4v": "mp4"}
"""Other extensions of the same formats."""
_CAPTIONS = ("caption", "text")


@dataclass(frozen=True)
class SampleFile:
    """One file: its extension in lower case, its path or name, and its bytes (texts) or where they are stored (media in tars)."""

    extension: str
    name: str
    data: bytes = b""
    byte_range: ByteRange | None = None


def modality_of(extension: str) -> str | None:
    """The first modality of the registry that accepts files with this extension."""
    if extension == "svg":
        return "image"
    return next((name for name, kind in REGISTRY.items() if ALIASES.get(extension, extension) in kind.extensions), None)


def assemble(key: str, members: list[SampleFile]) -> RawSample:
    """Combine members into a sample. Raises UnusableSample if two have the same role, or none has one."""
    for member in members:
        if len(member.data) > MAX_TEXT_BYTES:
            raise UnusableSample(f"{member.name} is larger than {MAX_TEXT_BYTES >> 20} MiB")
        if sum(other.extension == member.extension for other in members) > 1:
            raise UnusableSample(f"two members .{member.extension}")
    matches = [re.fullmatch(r"([0-9]{1,6})\.(\w+)", member.extension) for member in members]
    if all(matches):
        numbered = [(int(m[1]), m[2], member) for m, member in zip(matches, members, strict=True) if m]
        return _interleaved(key, sorted(numbered, key=lambda part: part[0]))
    entry: dict[str, Any] = {"key": key}
    ranges: dict[str, ByteRange | None] = {}
    ignored = []
    for member in members:
        modality = modality_of(member.extension)
        if modality is None or modality == "text":
            if member.extension not in TEXT_EXTENSIONS:
                ignored.append(member.extension)
        elif modality in entry:
            raise UnusableSample(f"two {modality} members: {entry[modality]}, {member.name}")
        else:
            entry[modality], ranges[modality] = member.name, member.byte_range
    entry |= _text({member.extension: member.data for member in members if member.extension in TEXT_EXTENSIONS})
    sample = sample_of(entry, key)
    parts = tuple(RawPart(part.modality, part.content, ranges.get(part.modality)) for part in sample.parts)
    return RawSample(sample.key, sample.noun, parts, ignored=tuple(sorted(ignored)))


def _interleaved(key: str, members: list[tuple[int, str, SampleFile]]) -> RawSample:
    if [number for number, _, _ in members] != list(range(len(members))):
        raise UnusableSample("its parts are not numbered 0, 1, 2, ...")
    entries, ranges = [], []
    for _, extension, member in members:
        modality = modality_of(extension)
        if modality is None:
            raise UnusableSample(f"extension {extension!r} belongs to no modality")
        entries.append({modality: decode(member) if modality == "text" else member.name})
        ranges.append(member.byte_range)
    sample = sample_of({"key": key, "parts": entries}, key)
    parts = (
        part if part.modality == "text" else RawPart(part.modality, part.content, byte_range)
        for part, byte_range in zip(sample.parts, ranges, strict=True)
    )
    return RawSample(sample.key, sample.noun, tuple(parts), ordered=True)


def _text(found: dict[str, bytes]) -> dict[str, Any]:
    """The text and the noun, as fields of a sample's line."""
    fields: dict[str, Any] = {}
    if "json" in found:
        try:
            entry = json.loads(found["json"])
        except (ValueError, RecursionError) as error:
            raise UnusableSample(f"its .json is not valid JSON: {error}") from error
        if isinstance(entry, dict):
            fields = {name: entry[name] for name in ("noun",) if name in entry}
            caption = next((entry[name] for name in _CAPTIONS if entry.get(name)), None)
            fields |= {"text": caption} if caption is not None else {}
    for extension in ("txt", "cls"):
        if extension in found and (extension == "txt" or "text" not in fields):
            fields["text"] = decode(SampleFile(extension, f".{extension}", found[extension]))
    return fields


def decode(member: SampleFile) -> str:
    """The text of a member. Raises UnusableSample if it is not UTF-8."""
    try:
        return member.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableSample(f"{member.name} is not UTF-8: {error.reason} at byte {error.start}") from error
