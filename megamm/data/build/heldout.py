"""Chooses the held-out samples of a source by two rules: a pure function of their nouns and texts.

noun: a share of the normalised nouns (data/raw/samples.py), so that held-out data has subjects that are not in
training.
combination: of the other samples with a text, a share of the distinct texts, so that held-out data has new
combinations ("firefighter, woman, dark skin") of words that training has all seen in other texts. A text stays in
training if otherwise one of its words would not occur in the training split. Every word loses about the same share of
its texts, so that no word becomes rare in training by chance. Samples with the same text are in the same split.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megamm.data.raw.samples import RawSample

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
        """Choose from a source's samples; both shares are between 0 and 1."""
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
        """The rule by which a held-out sample was chosen."""
        assert key in self, f"{key} is not held out"
        return "noun" if key in self.nouns else "combination"


def is_heldout(noun: str, share: float) -> bool:
    """Whether samples of this noun are held out: a pure function of the noun, true for `share` of all nouns."""
    # The first 64 bits of the hash are uniform: nouns below a larger share include those below a smaller one.
    first = int.from_bytes(hashlib.sha256(noun.encode()).digest()[:8], "big")
    return first < share * 2**64


def words(text: str) -> frozenset[str]:
    """The different words of a text, in lower case; "medium-dark" is one word."""
    return frozenset(_WORD.findall(text.casefold()))


def _combinations(samples: list[RawSample], share: float) -> list[str]:
    """Keys of the samples held out by their text, not by their noun."""
    texts = {s.key: " ".join(part.content for part in s.parts if part.modality == "text").casefold() for s in samples}
    media: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        media[texts[sample.key]].update(part.modality for part in sample.parts)
    counted = {text: [(word, frozenset(media[text])) for word in words(text)] for text in media if text}
    """The words of each text. A word counts separately with pictures and with videos: training needs both."""
    occurs = Counter(word for of_text in counted.values() for word in of_text)
    wanted, chosen = round(share * len(counted)), set[str]()
    held: Counter[tuple[str, frozenset[str]]] = Counter()
    """Number of chosen texts in which a word occurs."""
    # First at most the share of every word's texts. With long texts this may give too few; then take more.
    for most in (share, 1.0):
        # In the order of hashes: a random choice that depends on the texts only.
        for text in sorted(counted.keys() - chosen, key=_digest):
            # At least one text with each word stays in training.
            fits = all(held[word] < min(math.ceil(most * occurs[word]), occurs[word] - 1) for word in counted[text])
            if len(chosen) < wanted and fits:
                held.update(counted[text])
                chosen.add(text)
    return [key for key, text in texts.items() if text in chosen]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
