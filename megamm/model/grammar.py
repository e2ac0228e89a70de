"""The grammar of a document: which ids may follow, and the position (t, h, w) of each token.

A document is `<document_start>`, then text ids and media parts `<X_start> ids <X_end>`, then `<document_end>`. A part
of fixed length has exactly its number of ids; one of variable length ends after a whole number of strides, at least
one. A part starts only if the row has room for it, so every document that follows the grammar can be completed.
Positions are those of training (data/pipeline/packing.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megamm.common.errors import UserError
from megamm.modalities.protocol import Modality
from megamm.model.sampling import IdRanges
from megamm.model.vocabulary import Vocabulary

Position = tuple[int, int, int]


@dataclass(frozen=True)
class DocumentState:
    """Where a document stands: tokens so far, and within a media part its modality and its index.

    at: the position of the next text token; within a part, of its beginning. reach: the largest position of the part's
    tokens so far.
    """

    length: int = 0
    medium: str = ""
    index: int = 0
    at: int = 0
    reach: int = -1
    is_ended: bool = False


class DocumentGrammar:
    """The grammar of a run's vocabulary.

    outputs: the modalities that may be generated: text, media, or both for interleaved answers. longest: most tokens of
    a document, with its end. single: the document ends with the first media part, as when one medium is wanted.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        modalities: Mapping[str, Modality],
        outputs: Sequence[str],
        longest: int,
        single: bool = False,
    ) -> None:
        unknown = [name for name in outputs if name not in modalities]
        if unknown or not outputs:
            what = f"the model has no modality {unknown[0]!r}" if unknown else "no output modality"
            raise UserError(what, remedy=f"use one of {', '.join(modalities)}")
        if not vocabulary.has_control:
            raise UserError("the model has no control ids, so its documents are text only", remedy="use no grammar")
        self.vocabulary, self.modalities, self.longest, self.single = vocabulary, modalities, longest, single
        self.outputs = frozenset(outputs)
        self.end = vocabulary.document_end
        text = vocabulary["text"]
        self.text = (text.start, text.stop)
        media = [name for name in modalities if name != "text"]
        self.begins = {vocabulary.begin(name): name for name in media}
        self.ends = {name: vocabulary.end(name) for name in media}
        self.ids = {name: vocabulary[name].start for name in media}
        self._cells: dict[str, list[Position]] = {name: [] for name in media}
        self._allowed: dict[tuple[str, int, int], IdRanges] = {}

    def allowed(self, state: DocumentState) -> IdRanges:
        """Return the ids that may follow; () after the end."""
        if state.is_ended:
            return ()
        room = self.longest - state.length
        # Far from the end of the row, the room makes no difference.
        key = (state.medium, state.index if state.medium else min(state.length, 1), min(room, self._most_room))
        if key not in self._allowed:
            self._allowed[key] = self._in_part(state, room) if state.medium else self._between(state, room)
        return self._allowed[key]

    @property
    def _most_room(self) -> int:
        return max((self._least(name) for name in self.begins.values()), default=0) + 2

    def _least(self, name: str) -> int:
        """Tokens that a part needs in a row: its marks, its shortest length, and the document's end."""
        modality = self.modalities[name]
        return 3 + (modality.tokens_per_item or modality.stride)

    def _between(self, state: DocumentState, room: int) -> IdRanges:
        if state.length == 0:
            return ((self.vocabulary.document_start, self.vocabulary.document_start + 1),)
        found = [(self.end, self.end + 1)]
        if "text" in self.outputs and room > 1:
            found.append(self.text)
        found += [(b, b + 1) for b, name in self.begins.items() if name in self.outputs and room >= self._least(name)]
        return _joined(found)

    def _in_part(self, state: DocumentState, room: int) -> IdRanges:
        modality, first = self.modalities[state.medium], self.ids[state.medium]
        fixed = modality.tokens_per_item
        if fixed is not None and state.index == fixed:
            found = [(self.ends[state.medium], self.ends[state.medium] + 1)]
        else:
            ids = modality.valid_token_ids(state.index)
            found = [(first + ids.start, first + ids.stop)]
            if fixed is None and state.index and state.index % modality.stride == 0:
                mark = (self.ends[state.medium], self.ends[state.medium] + 1)
                # Another frame needs room for itself, the mark and the document's end.
                found = [*found, mark] if room >= modality.stride + 2 else [mark]
        return _joined(found)

    def advance(self, state: DocumentState, token: int) -> DocumentState:
        """Return the state after a token. ValueError if the token belongs to no document, whatever the outputs are."""
        after = replace(state, length=state.length + 1)
        if state.medium:
            if token == self.ends[state.medium]:
                at = state.at + state.reach + 1  # of the mark itself
                is_ended = self.single
                return replace(after, medium="", index=0, at=at + 1, reach=-1, is_ended=is_ended)
            reach = max(state.reach, *self._cell(state.medium, state.index))
            return replace(after, index=state.index + 1, reach=reach)
        if token in self.begins:
            return replace(after, medium=self.begins[token], index=0, at=state.at + 1, reach=-1)
        is_text = self.text[0] <= token < self.text[1]
        if not is_text and token not in (self.end, self.vocabulary.document_start):
            raise ValueError(f"id {token} is not valid at index {state.length} of a document")
        return replace(after, at=state.at + 1, is_ended=token == self.end)

    def position(self, state: DocumentState, token: int) -> Position:
        """Return (t, h, w) of this token, which follows."""
        if not state.medium:
            return (state.at,) * 3
        if token == self.ends[state.medium]:
            return (state.at + state.reach + 1,) * 3
        t, h, w = self._cell(state.medium, state.index)
        return state.at + t, state.at + h, state.at + w

    def _cell(self, medium: str, index: int) -> Position:
        """Return the position of a token within its part; a shorter part's are a prefix of a longer one's."""
        cells = self._cells[medium]
        if index >= len(cells):
            count = self.modalities[medium].tokens_per_item or max(
                2 * len(cells), index + self.modalities[medium].stride
            )
            stride = self.modalities[medium].stride
            table = self.modalities[medium].positions(-(-count // stride) * stride)
            cells[:] = [(int(t), int(h), int(w)) for t, h, w in table.T]
        return cells[index]

    def forced(self, state: DocumentState) -> int | None:
        """Return the only id that may follow, or None if there is a choice."""
        allowed = self.allowed(state)
        return allowed[0][0] if len(allowed) == 1 and allowed[0][1] - allowed[0][0] == 1 else None


def _joined(ranges: list[tuple[int, int]]) -> IdRanges:
    """Sort ranges, and join those that touch."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)
