"""The text of a prompt's continuation, decoded id by id: for stop strings, and for streaming to a terminal."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria

from megamm.common.sample import IntArray
from megamm.modalities.protocol import Modality

_CONTEXT = 16
"""Ids of the prompt that are decoded with the first ids after it: decoders look at no more than the last word."""
_INCOMPLETE = "\ufffd"
"""What the bytes of an incomplete character are decoded to."""


class Continuation:
    """The text of ids after a prompt; `before` are the text ids at the prompt's end, which the text continues.

    Some decoders drop the space before the first token, and a character can need several tokens. So each new id is
    decoded behind the ids of the text before it, and again with the next one while its character is incomplete.
    """

    def __init__(self, codec: Modality, before: IntArray, stops: Sequence[str], most: int) -> None:
        self.codec, self.stops, self.most = codec, stops, most
        self.count = 0
        self.is_complete = False
        """Whether a stop string, an end or `most` ids were reached: later ids are padding."""
        self._context, self._pending = before[-_CONTEXT:].tolist(), list[int]()
        self._settled, self._unsettled = "", ""
        self._cut: int | None = None

    @property
    def text(self) -> str:
        """The text of all ids so far, up to the first stop string."""
        return (self._settled + self._unsettled)[: self._cut]

    @property
    def certain(self) -> str:
        """The text that later ids cannot change: without an incomplete character, or the beginning of a stop string."""
        if self.is_complete:
            return self.text
        text = self.text.rstrip(_INCOMPLETE)
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]

    def add(self, id_: int) -> None:
        """Take the next id, which is not an end."""
        self.count += 1
        self._pending.append(id_)
        searched = len(self._settled)
        start = self._decode(self._context)
        whole = self._decode(self._context + self._pending)
        new = whole[len(start) :] if whole.startswith(start) else self._decode(self._pending)
        if new and not new.endswith(_INCOMPLETE):
            self._settled, self._unsettled = self._settled + new, ""
            self._context, self._pending = self._pending, []
        else:
            self._unsettled = new
        self._cut = self._first_stop(searched)
        self.is_complete = self._cut is not None or self.count == self.most

    def _decode(self, ids: list[int]) -> str:
        return str(self.codec.decode(np.array(ids, dtype=np.int64))) if ids else ""

    def _first_stop(self, searched: int) -> int | None:
        """The start of the first stop string; `searched` characters have been searched before."""
        text = (self._settled + self._unsettled).rstrip(_INCOMPLETE)
        found = [text.find(stop, max(0, searched - len(stop))) for stop in self.stops]
        return min((index for index in found if index >= 0), default=None)


class TextFollower(StoppingCriteria):
    """Gives each item of a batch its ids, and ends it where its text is complete.

    on_text gets the text of the first item in pieces, as soon as later ids cannot change it.
    """

    def __init__(
        self, items: Sequence[Continuation], first_id: int, ends: Sequence[int], on_text: Callable[[str], None] | None
    ) -> None:
        self.items, self.first_id, self.ends, self.on_text = items, first_id, frozenset(ends), on_text
        self.passed_on = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        for item, id_ in zip(self.items, input_ids[:, -1].tolist(), strict=True):
            if item.is_complete:
                continue
            # An imported model's ends are ids of its text tokenizer.
            if id_ in self.ends:
                item.is_complete = True
            else:
                item.add(id_ - self.first_id)
        if self.on_text is not None and len(certain := self.items[0].certain) > self.passed_on:
            self.on_text(certain[self.passed_on :])
            self.passed_on = len(certain)
        return torch.tensor([item.is_complete for item in self.items], device=input_ids.device)
