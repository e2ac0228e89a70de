"""Which samples of a source are held out, and by which rule; a pure function of their nouns and texts.

noun: a share of the normalised nouns (data/nouns.py), so that held-out data has subjects that training never sees.
combination: of the other samples with a text, a share of the different texts, so that held-out data has new
combinations ("firefighter, woman, dark skin") of words that training has all seen in other ones. A text is put back
into training where a word of it would occur in no text of the training split; samples of one text are on one side.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megamm.data.nouns import is_heldout
from megamm.data.samples import RawSample

Rule = Literal["noun", "combination"]
RULES: tuple[Rule, ...] = ("noun", "combination")
_WORD = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Heldout:
    """Keys of the held-out samples, by rule."""

    nouns: frozenset[str]
    combinations: frozenset[str]

    @classmethod
    def of(cls, samples: Iterable[RawSample], nouns: float, combinations: float) -> "Heldout":
        """Choose from a source's samples; both are shares between 0 and 1."""
        by_noun, rest = set(), []
        for sample in samples:
            if is_heldout(sample.noun, nouns):
                by_noun.add(sample.key)
            else:
                rest.append(sample)
        return cls(frozenset(by_noun), frozenset(_combinations(rest, combinations)))

    def __contains__(self, key: str) -> bool:
        return key in self.nouns or key in self.combinations

    def rule(self, key: str) -> Rule:
        """By which rule a held-out sample is held out."""
        assert key in self, f"{key} is not held out"
        return "noun" if key in self.nouns else "combination"


def words(text: str) -> frozenset[str]:
    """The different words of a text, in lower case; "medium-dark" is one word."""
    return frozenset(_WORD.findall(text.casefold()))


def _combinations(samples: list[RawSample], share: float) -> list[str]:
    """Keys of the samples whose text is held out though no noun of it is."""
    texts = {s.key: " ".join(part.content for part in s.parts if part.modality == "text") for s in samples}
    different = {text.casefold() for text in texts.values() if text}
    left = Counter(word for text in different for word in words(text))
    """In how many texts of the training split a word occurs."""
    chosen = set()
    for text in sorted((t for t in different if is_heldout(f"combination {t}", share)), key=_digest):
        if all(left[word] > 1 for word in words(text)):
            left.subtract(words(text))
            chosen.add(text)
    return [key for key, text in texts.items() if text.casefold() in chosen]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
