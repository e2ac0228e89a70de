"""Finds the source row for each row of the vocabulary's tables in a run that starts from another vocabulary.

In: both vocabularies and the rules of `init_from.vocabulary`. Out: spans of rows (ids) that cover the run's
vocabulary. A range that both have with the same codec is copied row by row. Any other change except an addition needs
a rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megamm.common.errors import UserError
from megamm.model.vocabulary import Range, Vocabulary

KEY = "init_from.vocabulary"


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of the run's tables: the source's rows from `taken_from` on, or new ones (None)."""

    start: int
    stop: int
    taken_from: int | None


@dataclass(frozen=True)
class Growth:
    """`spans` in the order of ids; `text`: the rows of the source's text, whose distribution new rows follow.

    lines: a log line for each range.
    """

    spans: tuple[Span, ...]
    text: range
    lines: tuple[str, ...]


def grow(theirs: Vocabulary, ours: Vocabulary, rules: Mapping[str, str]) -> Growth:
    """Plan the vocabulary change. Raises UserError if a range needs a rule, or a rule names no range."""
    sources, targets = ({part.name: part for part in v.ranges} for v in (theirs, ours))
    unknown = next((name for name in rules if name not in sources | targets), None)
    if unknown is not None:
        names = ", ".join(sources | targets)
        raise UserError(f"{KEY}.{unknown}: no such range", remedy=f"the ranges are {names}")
    spans: list[Span] = []
    lines = []
    for name, target in targets.items():
        found, line = _range(sources.get(name), target, rules.get(name))
        spans += found
        lines.append(f"{name}: {line}")
    for name, source in sources.items():
        if name not in targets:
            if rules.get(name) != "ignore":
                remedy = f"set {KEY}.{name}: ignore, or give the run a codec for it"
                raise UserError(f"the source has {source.size} ids of {name}, the run has none", remedy=remedy)
            lines.append(f"{name}: {source.size} dropped")
    text = sources["text"]
    return Growth(tuple(spans), range(text.start, text.stop), tuple(lines))


def _range(source: Range | None, target: Range, rule: str | None) -> tuple[list[Span], str]:
    """The spans of one of the run's ranges, and its log line."""
    key = f"{KEY}.{target.name}"
    if rule == "ignore":
        raise UserError(f"{key}: ignore, but the run has this range", remedy=f"set {key}: load or {key}: new")
    if source is None and rule == "load":
        raise UserError(f"{key}: load, but the source has no such range", remedy="remove the key: the range is new")
    if source is None or rule == "new":
        why = "not in the source" if source is None else f"by rule, {source.size} dropped"
        return [Span(target.start, target.stop, None)], f"{target.size} new ({why})"
    if rule is None:
        if source.codec_id != target.codec_id:
            what = f"{target.name} has codec {target.codec_id}, the source {source.codec_id}: the ids differ in meaning"
            remedy = f"set {key}: new, or {key}: load if the ids have the same meaning, or use the source's codec"
            raise UserError(what, remedy=remedy)
        if source.size > target.size:
            what = f"{target.name} has {target.size} ids, the source {source.size}"
            raise UserError(what, remedy=f"set {key}: load to drop the last ones, or {key}: new")
    taken = min(source.size, target.size)
    spans = [Span(target.start, target.start + taken, source.start)]
    line = f"{taken} kept" if source.start == target.start else f"{taken} moved from {source.start} to {target.start}"
    if target.size > taken:
        spans.append(Span(target.start + taken, target.stop, None))
        line += f", {target.size - taken} new"
    if source.size > taken:
        line += f", {source.size - taken} dropped"
    return spans, line + (" (by rule: another codec)" if source.codec_id != target.codec_id else "")
