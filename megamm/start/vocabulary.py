"""Rows of the vocabulary's tables in a run that starts from another vocabulary: from where each of them comes.

In: both vocabularies and the rules of `start_from.vocabulary`. Out: spans of rows (ids), which make up all of the
run's. A range that both have with the same codec is taken row by row. All else that is not an addition needs a rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megamm.errors import UserError
from megamm.model.vocabulary import Range, Vocabulary

KEY = "start_from.vocabulary"


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of the run's tables: those of the source from `taken_from` on, or new ones (None)."""

    start: int
    stop: int
    taken_from: int | None


@dataclass(frozen=True)
class Growth:
    """`spans` in the order of ids; `text`: the rows of the source's text, from which new rows are drawn.

    lines: what becomes of each range, for a person.
    """

    spans: tuple[Span, ...]
    text: range
    lines: tuple[str, ...]


def grow(theirs: Vocabulary, ours: Vocabulary, rules: Mapping[str, str]) -> Growth:
    """From the source's vocabulary to the run's. UserError where a range needs a rule, or a rule has no range."""
    sources, targets = ({part.name: part for part in v.ranges} for v in (theirs, ours))
    unknown = next((name for name in rules if name not in sources | targets), None)
    if unknown is not None:
        names = ", ".join(sources | targets)
        raise UserError(f"{KEY}.{unknown}: neither vocabulary has it", remedy=f"the ranges are {names}")
    spans: list[Span] = []
    lines = []
    for name, target in targets.items():
        found, line = _range(sources.get(name), target, rules.get(name))
        spans += found
        lines.append(f"{name}: {line}")
    for name, source in sources.items():
        if name not in targets:
            if rules.get(name) != "ignore":
                remedy = f"write {KEY}.{name}: ignore, or give the run a codec for it"
                raise UserError(f"the source has {source.size} ids of {name}, the run has none", remedy=remedy)
            lines.append(f"{name}: {source.size} dropped")
    text = sources["text"]
    return Growth(tuple(spans), range(text.start, text.stop), tuple(lines))


def _range(source: Range | None, target: Range, rule: str | None) -> tuple[list[Span], str]:
    """The spans of one of the run's ranges, and what becomes of it."""
    key = f"{KEY}.{target.name}"
    if rule == "ignore":
        raise UserError(f"{key}: ignore, but the run has this range", remedy="write load or new")
    if source is None and rule == "load":
        raise UserError(f"{key}: load, but the source has no such range", remedy="leave it out: it is new")
    if source is None or rule == "new":
        why = "not in the source" if source is None else f"by rule, {source.size} dropped"
        return [Span(target.start, target.stop, None)], f"{target.size} new ({why})"
    if rule is None:
        if source.codec_id != target.codec_id:
            what = f"{target.name} has codec {target.codec_id}, the source {source.codec_id}: the ids mean other things"
            remedy = f"write {key}: new, or {key}: load if they do not, or use the source's codec"
            raise UserError(what, remedy=remedy)
        if source.size > target.size:
            what = f"{target.name} has {target.size} ids, the source {source.size}"
            raise UserError(what, remedy=f"write {key}: load to drop the last ones, or new")
    taken = min(source.size, target.size)
    spans = [Span(target.start, target.start + taken, source.start)]
    line = f"{taken} kept" if source.start == target.start else f"{taken} moved from {source.start} to {target.start}"
    if target.size > taken:
        spans.append(Span(target.start + taken, target.stop, None))
        line += f", {target.size - taken} new"
    if source.size > taken:
        line += f", {source.size - taken} dropped"
    return spans, line + (" (by rule: another codec)" if source.codec_id != target.codec_id else "")
