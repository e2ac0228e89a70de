"""Tensors of a run that starts from other weights: which are loaded, which new, and which of the source left out.

In: names and shapes on both sides, and `start_from.rules`: pairs of an action and a pattern (`*` and `?`, over whole
names), in order. The first rule that matches a name decides; what none matches is loaded. A tensor is never guessed:
what cannot be done as it is said is an error that names it.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from megamm.errors import UserError

Shape = tuple[int, ...]
Rule = tuple[str, str]
SHOWN = 4
"""Tensors that an error names at most."""


def decide(
    theirs: Mapping[str, Shape], ours: Mapping[str, Shape], tables: set[str], rules: Sequence[Rule]
) -> dict[str, str]:
    """ "load" or "new" for each of the run's tensors.

    tables: those with the vocabulary as their first axis, in which the two may differ. UserError for every tensor that
    does not fit, and for a rule that matches none.
    """
    names = theirs.keys() | ours.keys()
    for action, pattern in rules:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, sorted(names), n=1, cutoff=0.0)
            raise UserError(
                f"start_from.rules: {action} {pattern!r} matches no tensor",
                remedy=f"the nearest name is {near[0]}; `megamm checkpoint show` lists a checkpoint's",
            )
    actions = {name: next((a for a, pattern in rules if fnmatchcase(name, pattern)), "load") for name in sorted(names)}
    problems = [f"{name} ({why})" for name, why in _problems(theirs, ours, tables, actions)]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"the source does not fit the model: {', '.join(problems[:SHOWN])}{more}",
            remedy="say under start_from.rules what is `new` in the model, and what of the source to `ignore`",
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
            yield name, "to be ignored, but the model has it"
        elif action == "load" and name not in theirs:
            yield name, "only in the model"
        elif action == "load" and theirs[name][first:] != ours[name][first:]:
            yield name, f"{list(theirs[name])} in the source, {list(ours[name])} in the model"
