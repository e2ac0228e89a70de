"""Extracts the subject of a caption, so that held-out data shares no subject with the training data.

In: a caption. Out: its normalised noun, e.g. "man health worker: medium skin tone" -> "health worker". All variants of
a noun (skin tone, gender, colour, direction, number, plural), from every source, are hashed into the same split.
"""

import hashlib
import re

_VARIANT_WORDS = """
a an the of in on with and or by to for from at s
skin tone light medium dark pale bright
man men woman women boy boys girl girls person people male female adult gentleman lady
red orange yellow green blue purple violet pink brown black white grey gray gold golden silver cyan magenta
left right up upward upwards down downward downwards north south east west northeast northwest southeast
southwest front back top bottom forward backward clockwise counterclockwise anticlockwise
one two three four five six seven eight nine ten eleven twelve
small big large little simple outline outlined shadow filled coloring b w bw
icon sign symbol button clipart emoji
"""
_VARIANTS = frozenset(_VARIANT_WORDS.split())
_WORD = re.compile(r"[^\W\d_]+")


def normalise_noun(caption: str) -> str:
    """The caption's words: lower-case, singular, sorted, without variant words unless there are no others."""
    words = _WORD.findall(caption.casefold())
    kept = [word for word in words if word not in _VARIANTS] or words or [caption.strip()]
    return " ".join(sorted({_singular(word) for word in kept}))


def is_heldout(noun: str, share: float) -> bool:
    """Whether samples of this noun are held out: a pure function of the noun, true for `share` of all nouns."""
    first = int.from_bytes(hashlib.sha256(noun.encode()).digest()[:8], "big")
    return first < share * 2**64


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
