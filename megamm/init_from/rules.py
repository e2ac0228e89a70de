"""Decides what a run that starts from other weights loads, initialises and ignores: tensors, and rows of its tables.

`decide` gives each tensor an action. In: names and shapes on both sides, and `init_from.rules`: pairs of an action and
a pattern (`*` and `?`, matching whole names), in order. The first rule that matches a name decides; a name without a
match is loaded. Nothing is guessed: if an action is impossible, the error names the tensor.

`resize_vocabulary` finds the source row of each row of the vocabulary's tables. In: both vocabularies and the rules of
`init_from.vocabulary`. A range that both have with the same codec is copied row by row. Any other change except an
addition needs a rule.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megamm.common.errors import UserError
from megamm.model.vocabulary import Range, Vocabulary

Shape = tuple[int, ...]
Rule = tuple[str, str]
SHOWN = 4
"""Maximum number of tensors that an error names."""
KEY = "init_from.vocabulary"


def decide(
    theirs: Mapping[str, Shape], ours: Mapping[str, Shape], tables: set[str], rules: Sequence[Rule]
) -> dict[str, str]:
    """Return "load" or "new" for each of the run's tensors.

    tables: tensors with the vocabulary as their first axis, whose size there may differ. Raises UserError for tensors
    that do not fit, and for a rule that matches no tensor.
    """
    names = theirs.keys() | ours.keys()
    for action, pattern in rules:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, sorted(names), n=1, cutoff=0.0)
            raise UserError(
                f"init_from.rules: {action} {pattern!r} matches no tensor",
                remedy=f"the nearest name is {near[0]}; `megamm checkpoint show` lists all names of a checkpoint",
            )
    # In the order of the rules: the first that matches a name decides.
    actions = {name: next((a for a, pattern in rules if fnmatchcase(name, pattern)), "load") for name in sorted(names)}
    problems = [f"{name} ({why})" for name, why in _problems(theirs, ours, tables, actions)]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"the source does not match the model: {', '.join(problems[:SHOWN])}{more}",
            remedy="under init_from.rules set `new` for tensors of the model, `ignore` for tensors of the source",
        )
    return {name: actions[name] for name in ours}


def _problems(
    theirs: Mapping[str, Shape], ours: Mapping[str, Shape], tables: set[str], actions: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield the tensors whose action is impossible, with the reason."""
    for name, action in actions.items():
        first = int(name in tables)  # the rows of a table may differ: vocabulary rules decide about them
        if name not in ours:
            if action != "ignore":
                yield name, "only in the source"
        elif action == "ignore":
            yield name, "set to ignore, but the model has it"
        elif action == "load" and name not in theirs:
            yield name, "only in the model"
        elif action == "load" and theirs[name][first:] != ours[name][first:]:
            yield name, f"{list(theirs[name])} in the source, {list(ours[name])} in the model"


@dataclass(frozen=True)
class RowSpan:
    """Rows [start, stop) of the run's tables: the source's rows from `taken_from` on, or new ones (None)."""

    start: int
    stop: int
    taken_from: int | None


@dataclass(frozen=True)
class VocabularyResize:
    """The sources of the rows of the run's vocabulary tables.

    spans: in the order of ids, covering all of them; text: the rows of the source's text, whose distribution new rows
    follow; lines: a log line for each range.
    """

    spans: tuple[RowSpan, ...]
    text: range
    lines: tuple[str, ...]


def resize_vocabulary(theirs: Vocabulary, ours: Vocabulary, rules: Mapping[str, str]) -> VocabularyResize:
    """Plan the vocabulary change. Raises UserError if a range needs a rule, or a rule names no range."""
    sources, targets = ({part.name: part for part in v.ranges} for v in (theirs, ours))
    unknown = next((name for name in rules if name not in sources | targets), None)
    if unknown is not None:
        names = ", ".join(sources | targets)
        raise UserError(f"{KEY}.{unknown}: no such range", remedy=f"the ranges are {names}")
    spans: list[RowSpan] = []
    lines = []
    for name, target in targets.items():
        found, line = _range_spans(sources.get(name), target, rules.get(name))
        spans += found
        lines.append(f"{name}: {line}")
    for name, source in sources.items():
        if name not in targets:
            if rules.get(name) != "ignore":
                remedy = f"set {KEY}.{name}: ignore, or give the run a codec for it"
                raise UserError(f"the source has {source.size} ids of {name}, the run has none", remedy=remedy)
            lines.append(f"{name}: {source.size} dropped")
    text = sources["text"]  # every vocabulary has it
    return VocabularyResize(tuple(spans), range(text.start, text.stop), tuple(lines))


def _range_spans(source: Range | None, target: Range, rule: str | None) -> tuple[list[RowSpan], str]:
    """Return the spans of one of the run's ranges, and its log line."""
    key = f"{KEY}.{target.name}"
    if rule == "ignore":
        raise UserError(f"{key}: ignore, but the run has this range", remedy=f"set {key}: load or {key}: new")
    if source is None and rule == "load":
        raise UserError(f"{key}: load, but the source has no such range", remedy="remove the key: the range is new")
    if source is None or rule == "new":
        why = "not in the source" if source is None else f"by rule, {source.size} dropped"
        return [RowSpan(target.start, target.stop, None)], f"{target.size} new ({why})"
    if rule is None:
        if source.codec_id != target.codec_id:
            what = f"{target.name} has codec {target.codec_id}, the source {source.codec_id}: the ids differ in meaning"
            remedy = f"set {key}: new, or {key}: load if the ids have the same meaning, or use the source's codec"
            raise UserError(what, remedy=remedy)
        if source.size > target.size:
            what = f"{target.name} has {target.size} ids, the source {source.size}"
            raise UserError(what, remedy=f"set {key}: load to drop the last ones, or {key}: new")
    taken = min(source.size, target.size)
    spans = [RowSpan(target.start, target.start + taken, source.start)]
    line = f"{taken} kept" if source.start == target.start else f"{taken} moved from {source.start} to {target.start}"
    if target.size > taken:
        spans.append(RowSpan(target.start + taken, target.stop, None))
        line += f", {target.size - taken} new"
    if source.size > taken:
        line += f", {source.size - taken} dropped"
    return spans, line + (" (by rule: another codec)" if source.codec_id != target.codec_id else "")
