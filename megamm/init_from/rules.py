"""Decides for each tensor of a run that starts from other weights whether it is loaded or new; ignores the rest.

In: names and shapes on both sides, and `init_from.rules`: pairs of an action and a pattern (`*` and `?`, matching
whole names), in order. The first rule that matches a name decides; a name without a match is loaded. Nothing is
guessed: if an action is impossible, the error names the tensor.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from megamm.common.errors import UserError

Shape = tuple[int, ...]
Rule = tuple[str, str]
SHOWN = 4
"""Maximum number of tensors that an error names."""


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
    for name, action in actions.items():
        first = int(name in tables)
        if name not in ours:
            if action != "ignore":
                yield name, "only in the source"
        elif action == "ignore":
            yield name, "set to ignore, but the model has it"
        elif action == "load" and name not in theirs:
            yield name, "only in the model"
        elif action == "load" and theirs[name][first:] != ours[name][first:]:
            yield name, f"{list(theirs[name])} in the source, {list(ours[name])} in the model"
