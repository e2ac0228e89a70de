"""Media and texts in fields of unknown names: a sample that would be used without them is not whole.

In: the fields of a line or row. Out: for each modality that the sample has no part of, a field that seems to hold one.
Fields are judged by what they hold (a path or address of a medium), and texts by the name, because any string is one.
"""

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from megamm.data.raw.extensions import modality_of

_TEXTS = """
caption captions text texts txt prompt prompts description descriptions transcript transcripts transcription
transcriptions sentence sentences conversation conversations messages dialog dialogue alt instruction response
question questions answer answers utterance lyrics
"""
"""Words of field names that hold the text of a sample in many data sets."""
_ABOUT = "id ids score length len hash language lang url uri path file type source model count"
"""Words of names of fields that say something about a text."""
_WEB_MEDIA = {"image": "image img picture photo", "audio": "audio sound", "video": "video clip"}
"""Modality -> words of the names of fields with an address of such a medium."""
_WEB = {"url", "urls", "uri", "link", "links"}
_DEPTH = 4
"""Levels of lists and objects that are searched."""


def lost_fields(fields: dict[str, Any], there: set[str], is_captioned: bool = False) -> Iterator[tuple[str, str]]:
    """(modality, reason) of the fields that hold a part of a modality which is not `there`.

    fields: those of unknown names. is_captioned: the sample's text is a caption, so an address of a medium is that of
    what it describes.
    """
    media = {name: _medium(name, fields[name], is_captioned) for name in sorted(fields)}
    yield from ((modality, reason) for modality, reason in media.values() if modality and modality not in there)
    if there and "text" not in there:
        names = [name for name, (modality, _) in media.items() if not modality and _is_text(name, fields[name])]
        if names:
            fix = 'call the field "text", or use --allow-missing text'
            yield "text", f'field "{names[0]}" seems to be its text: {fix}'


def _medium(name: str, value: Any, is_captioned: bool) -> tuple[str, str]:
    """The modality of a medium that a field names, or "", and the reason why it is lost."""
    for text in _strings(value, _DEPTH):
        if "://" in text:
            if modality := _modality_on_web(name, text, is_captioned):
                fix = f'download it and name the file in "{modality}", or use --allow-missing {modality}'
                return modality, f'field "{name}" is the address of {modality} on the web, which is not fetched: {fix}'
        # Whole texts can end in ".png" too.
        elif len(text) < 1000 and (modality := _medium_of(PurePath(text).suffix)):
            fix = f'call the field "{modality}"' if isinstance(value, str) else 'list them in "parts"'
            return modality, f'field "{name}" names a file of {modality}: {fix}, or remove it'
    return "", ""


def _modality_on_web(name: str, address: str, is_captioned: bool) -> str:
    """The modality of the medium at an address, or "" if it is where a text came from."""
    words = set(_words(name))
    named = next((kind for kind, names in _WEB_MEDIA.items() if words.intersection(names.split())), "")
    if not address.startswith(("http://", "https://")) or " " in address or not words & _WEB:
        return ""
    try:
        found = _medium_of(PurePath(urlsplit(address).path).suffix) if len(address) < 4000 else ""
    except ValueError:
        found = ""
    return (found or named) if named or is_captioned else ""


def _medium_of(suffix: str) -> str:
    """The modality of a path's suffix; "" for texts and others."""
    modality = modality_of(suffix.lower().lstrip(".")) or ""
    return "" if modality == "text" else modality


def _strings(value: Any, depth: int) -> Iterator[str]:
    """The strings of a field: itself, or the first of each list and all of an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and value and depth:
        yield from _strings(value[0], depth - 1)
    elif isinstance(value, dict) and depth:
        for inner in value.values():
            yield from _strings(inner, depth - 1)


def _words(name: str) -> list[str]:
    """The words of a name such as image_url, imageUrl or TEXT, in lower case."""
    return re.findall(r"[a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower())


def _is_text(name: str, value: Any) -> bool:
    """Whether a field with this name and value holds the text of a sample in other data sets."""
    words = set(_words(name))
    is_named = bool(words.intersection(_TEXTS.split())) and not words.intersection(_ABOUT.split())
    return is_named and isinstance(value, str | list | dict) and bool(value)
