"""`megamm checkpoint list|show|verify|diff|prune`: list, show, verify, compare and remove checkpoints.

Each takes a run's output folder, a checkpoint's folder, or a URL of remote storage.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from megamm.common.errors import UserError
from megamm.common.log import log_to_console

app = typer.Typer(no_args_is_help=True, help="List, show, verify, compare and remove checkpoints.")
Checkpoints = Annotated[list[str], typer.Argument(help="output folder of a run, folder of a checkpoint, or URL")]
Checkpoint = Annotated[str, typer.Argument(help="checkpoint's folder or URL; for a run, its newest checkpoint")]


@app.command("list")
def list_(checkpoints: Checkpoints) -> None:
    """List checkpoints: step, size, age, storage, valid or damaged (by names and sizes), newest, best.

    Of local storage, only this node's files are listed; a step is valid there if every rank's part is on this node.
    """
    from megamm.checkpoint import inspect

    log_to_console()
    for checkpoint in checkpoints:
        found = inspect.find(checkpoint, with_local=True)
        best, newest = inspect.best_of([f for f in found if f.kind != "local"]), max(f.step for f in found)
        for each in found:
            problem, age = each.problem(), each.age()
            marks = [m for m, is_so in (("newest", each.step == newest), ("best", each.name == best)) if is_so]
            columns = [
                f"{each.step:>8}",
                f"{sum(each.sizes().values()) / 1e6:>10.1f} MB",
                f"{_duration(age) if age is not None else '-':>6}",
                f"{each.kind:<7}",
                "damaged: " + problem if problem else "valid",
                *marks,
                each.where,
            ]
            print("  ".join(columns))


@app.command()
def show(
    checkpoint: Checkpoint,
    config: Annotated[bool, typer.Option("--config", help="also print its config")] = False,
) -> None:
    """Print state, layout, versions and every tensor with its shape and dtype."""
    from megamm.checkpoint import inspect, whole_tensors

    log_to_console()
    with inspect.find_one(checkpoint).here() as folder:
        state = json.loads((folder / "state.json").read_bytes())
        recorded, mixture = state.pop("config", {}), state.pop("mixture", None)
        for key, value in state.items():
            print(f"{key}: {json.dumps(value)}")
        print(f"mixture: {'recorded' if mixture else 'not recorded'}")
        if config:
            print(*(f"{key} = {json.dumps(value)}" for key, value in _flat(recorded).items()), sep="\n")
        described = whole_tensors.described(folder)
        for name, entry in described.items():
            print(f"{name}  {list(entry.shape)}  {entry.dtype}")
        weights = sum(e.elements for name, e in described.items() if not name.startswith("optimizer."))
        print(f"{len(described)} tensors, {weights:,} weights")


@app.command()
def verify(checkpoints: Checkpoints) -> None:
    """Compare every file with its digest; exit code 1 if one differs."""
    from megamm.checkpoint import inspect

    log_to_console()
    damaged = False
    for each in [found for checkpoint in checkpoints for found in inspect.find(checkpoint)]:
        damage = each.damage()
        damaged |= bool(damage)
        print(f"{each.where}: {'damaged: ' + damage if damage else 'valid'}")
    if damaged:
        raise typer.Exit(1)


@app.command()
def diff(one: Checkpoint, other: Checkpoint) -> None:
    """Show differences in state, config and tensors, with the largest of each tensor; exit code 1 if there is any."""
    from megamm.checkpoint import inspect, whole_tensors

    log_to_console()
    lines: list[str] = []
    with inspect.find_one(one).here() as a, inspect.find_one(other).here() as b:
        states = [_flat(_state(folder)) for folder in (a, b)]
        for key in sorted(states[0].keys() | states[1].keys()):
            values = [json.dumps(state[key]) if key in state else "absent" for state in states]
            if values[0] != values[1]:
                lines.append(f"{key}: {values[0]} -> {values[1]}")
        ours, theirs = whole_tensors.described(a), whole_tensors.described(b)
        lines += [f"only in the first: {name}" for name in sorted(ours.keys() - theirs.keys())]
        lines += [f"only in the second: {name}" for name in sorted(theirs.keys() - ours.keys())]
        common = {name: entry for name, entry in ours.items() if name in theirs}
        for name, entry in common.items():
            if theirs[name] != entry:
                was, now = (f"{list(e.shape)} {e.dtype}" for e in (entry, theirs[name]))
                lines.append(f"{name}: {was} -> {now}")
        same_form = {name: entry for name, entry in common.items() if theirs[name] == entry}
        found = list(whole_tensors.differences(a, b, same_form))
    for d in found:
        lines.append(f"{d.name}: {d.differing:,} of {same_form[d.name].elements:,} differ, by {d.max_abs:.3g} at most")
    print(*lines, f"{len(same_form) - len(found)} tensors are bit-identical", sep="\n")
    if lines:
        raise typer.Exit(1)


@app.command()
def prune(
    checkpoint: Annotated[str, typer.Argument(help="output folder of a run, or URL")],
    keep: Annotated[int, typer.Option(help="how many of the newest to keep", min=1)],
    delete: Annotated[bool, typer.Option("--delete", help="delete them; by default they are only listed")] = False,
) -> None:
    """Remove old checkpoints; never the newest valid one, the best one, or one that is being uploaded."""
    from megamm.checkpoint import inspect, retention

    log_to_console()
    found = inspect.find(checkpoint)
    if found[0].kind == "local":
        raise UserError(
            "prune does not change local storage", where=checkpoint, remedy="delete the folder after the run has ended"
        )
    # Digests are verified from the newest back, until one is valid: this one is never deleted, whatever `keep` is.
    valid = next((each for each in reversed(found) if not each.damage()), None)
    if valid is None:
        raise UserError(
            "no valid checkpoint", where=checkpoint, remedy="nothing was removed; run `megamm checkpoint verify`"
        )
    kept = {valid.name, inspect.best_of(found) or valid.name}
    if found[0].folder is not None:
        kept.add(retention.uploading(found[0].folder.parent.parent))
    doomed = retention.doomed([each.name for each in found], keep, kept)
    for each in found:
        if each.name in doomed:
            if delete and each.remote is not None:
                each.remote.remove(each.name)
            elif delete and each.folder is not None:
                retention.remove(each.folder)
            print(f"{'removed' if delete else 'would remove'} {each.where}")
    print(f"{len(found) - len(doomed)} kept" + ("" if delete or not doomed else "; --delete removes the others"))


def _state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's state with today's config keys, so that a renamed key is not a difference."""
    from megamm.config.load import rename_keys

    state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
    rename_keys(state.get("config", {}), folder)
    return state


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): value}
    return {key: inner for k, v in value.items() for key, inner in _flat(v, f"{prefix}{k}.").items()}


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
