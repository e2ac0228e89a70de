"""Joins files to a sample: those of one name in a folder, the members of one key in a tar.

In: files with their extension; texts with their bytes, media by name or position. Out: a `RawSample`, or UnusableSample
with the reason. The extension decides the modality. The text is the .txt (or .caption) file, else "caption" or "text"
of a .json file (which may also give "noun"), else the .cls file. Numbered extensions (0.txt, 1.png) make an interleaved
sample. A sample is whole or not there: one that would lose a part is unusable, unless that modality may be missing.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from megamm.data.raw.extensions import OTHER, TEXT_EXTENSIONS, modality_of, recognised
from megamm.data.raw.lost_fields import lost_fields
from megamm.data.raw.samples import ByteRange, Missing, RawPart, RawSample, UnusableSample, sample_of

MAX_TEXT_BYTES = 16 * 2**20
_CAPTIONS = ("caption", "text")


@dataclass(frozen=True)
class SampleFile:
    """One file: its extension in lower case, its path or name, and its bytes (texts) or their position (in a tar)."""

    extension: str
    name: str
    data: bytes = b""
    byte_range: ByteRange | None = None


def assemble(key: str, members: list[SampleFile], may_miss: frozenset[str] = frozenset()) -> RawSample:
    """Combine members into a sample. Raises UnusableSample if two have the same role, none has one, or one is lost.

    may_miss: modalities without which a sample is still used.
    """
    for member in members:
        if len(member.data) > MAX_TEXT_BYTES:
            raise UnusableSample(f"its .{member.extension} is larger than {MAX_TEXT_BYTES >> 20} MiB")
        if sum(other.extension == member.extension for other in members) > 1:
            raise UnusableSample(f"two members .{member.extension}")
    matches = [re.fullmatch(r"([0-9]{1,6})\.(\w+)", member.extension) for member in members]
    if all(matches):
        # All names are numbers: an interleaved sample. One other name makes it an unordered one.
        numbered = [(int(m[1]), m[2], member) for m, member in zip(matches, members, strict=True) if m]
        return _interleaved(key, sorted(numbered, key=lambda part: part[0]), may_miss)
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
    texts = {member.extension: member.data for member in members if member.extension in TEXT_EXTENSIONS}
    missing = []
    try:
        entry |= _text(texts)
        missing += _lost_text(texts, entry)
    except UnusableSample as error:
        missing.append(Missing("text", str(error)))
    missing += _lost(ignored, entry)
    _require(missing, may_miss)
    # Checked like a line of samples.jsonl, so all formats have the same rules and messages.
    sample = sample_of(entry, key, may_miss)
    parts = tuple(RawPart(part.modality, part.content, ranges.get(part.modality)) for part in sample.parts)
    missing += sample.missing
    return RawSample(sample.key, sample.noun, parts, ignored=tuple(sorted(ignored)), missing=tuple(missing))


def _require(missing: list[Missing], may_miss: frozenset[str]) -> None:
    """Raise UnusableSample for the first part that is lost and must not be."""
    for lost in missing:
        if lost.modality not in may_miss:
            raise UnusableSample(lost.reason)


def _lost(ignored: list[str], entry: dict[str, Any]) -> list[Missing]:
    """The parts that the sample would lose with these ignored members: media and texts that it has no other of."""
    there = {"text" if name in _CAPTIONS else name for name in entry} - {"key", "noun"}
    lost = []
    for extension in sorted(ignored):
        modality = recognised(extension)
        if modality == OTHER and there == {"text"}:
            lost.append(Missing(OTHER, f"nothing but its text would be used: .{extension} files are not read"))
        elif modality not in (None, OTHER, *there):
            what = f"its {modality} .{extension} is not read"
            fix = "rename it" if modality_of(extension.rpartition(".")[2]) else "convert it"
            lost.append(Missing(modality or OTHER, f"{what}: {fix}, or use --allow-missing {modality}"))
    return lost


def _lost_text(texts: dict[str, bytes], entry: dict[str, Any]) -> list[Missing]:
    """The text of a .json file under another name than caption or text, if the sample has no text."""
    there = set(entry) - {"key", "noun"}
    if "json" not in texts or there & {*_CAPTIONS} or not there:
        return []
    fields = json.loads(texts["json"])
    fields = fields if isinstance(fields, dict) else {}
    fields = {name: value for name, value in fields.items() if name not in _CAPTIONS}
    lost = [Missing(modality, f"its .json: {reason}") for modality, reason in lost_fields(fields, there)]
    # Its addresses and paths are where the media came from.
    return [part for part in lost if part.modality == "text"]


def _interleaved(key: str, members: list[tuple[int, str, SampleFile]], may_miss: frozenset[str]) -> RawSample:
    """An interleaved sample from (number, extension, member), in order of the numbers."""
    if [number for number, _, _ in members] != list(range(len(members))):
        raise UnusableSample("its parts are not numbered 0, 1, 2, ...")
    entries, ranges, missing = [], [], []
    for _, extension, member in members:
        modality = "text" if extension == "caption" else modality_of(extension)
        if modality is None:
            missing.append(Missing(recognised(extension) or OTHER, f"extension {extension!r} belongs to no modality"))
            continue
        entries.append({modality: decode(member) if modality == "text" else member.name})
        ranges.append(member.byte_range)
    _require(missing, may_miss)
    sample = sample_of({"key": key, "parts": entries}, key)
    parts = (
        part if part.modality == "text" else RawPart(part.modality, part.content, byte_range)
        for part, byte_range in zip(sample.parts, ranges, strict=True)
    )
    return RawSample(sample.key, sample.noun, tuple(parts), ordered=True, missing=tuple(missing))


def _text(found: dict[str, bytes]) -> dict[str, Any]:
    """The text and the noun, as fields of a sample's line."""
    fields: dict[str, Any] = {}
    if "txt" in found and "caption" in found:
        raise UnusableSample("both a .txt and a .caption file")
    if "json" in found:
        fields = _text_of_json(found["json"], needed=not {"txt", "caption"} & set(found))
    # The .txt file replaces a caption of the .json file; a class name is used only without any other text.
    for extension in ("txt", "caption", "cls"):
        if extension in found and (extension != "cls" or "text" not in fields):
            fields["text"] = decode(SampleFile(extension, f"its .{extension}", found[extension]))
    return fields


def _text_of_json(data: bytes, needed: bool) -> dict[str, Any]:
    """Caption and noun of a .json file; an empty caption is unusable if it is needed."""
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnusableSample(f"its .json is not valid JSON: {error}") from error
    if not isinstance(entry, dict):
        return {}
    # Other fields of a .json file are metadata of the tool that made the data set.
    fields = {name: entry[name] for name in ("noun",) if name in entry}
    named = [name for name in _CAPTIONS if name in entry]
    caption = next((entry[name] for name in named if entry[name]), None)
    if needed and named and caption is None:
        raise UnusableSample(f'the "{named[0]}" of its .json is empty')
    return fields | ({"text": caption} if caption is not None else {})


def decode(member: SampleFile) -> str:
    """The text of a member. Raises UnusableSample if it is not UTF-8."""
    try:
        return member.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableSample(f"{member.name} is not UTF-8: {error.reason} at byte {error.start}") from error
