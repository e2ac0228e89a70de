"""`megamm convert diff`: what differs between the weights of two checkpoints, folders or files, of whatever format.

Two native checkpoints are compared under their own names; a native one beside anything else under the names of its
family of transformers. A dtype alone is a difference, too; values are compared all the same.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megamm.convert.tensors import is_native, layer_of, natural, open_place
from megamm.tiers.tensors import difference, pairs


@dataclass
class Diff:
    """Sentences on what differs, the tensors they are about, and how many are the same."""

    lines: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    same: int = 0

    def add(self, name: str, line: str) -> None:
        self.names.append(name)
        self.lines.append(line)

    @property
    def first_layer(self) -> int | None:
        """The first layer that has a difference; None if none has."""
        layers = [layer for layer in map(layer_of, self.names) if layer is not None]
        return min(layers) if layers else None


def compare(one: Path, other: Path) -> Diff:
    """UserError for what cannot be read, and for a model that no family of transformers has where one is needed."""
    by_family = not (is_native(one) and is_native(other))
    a, b = (open_place(place, by_family=by_family) for place in (one, other))
    done = Diff()
    for name in sorted(a.described.keys() - b.described.keys(), key=natural):
        done.add(name, f"only in the first: {name}")
    for name in sorted(b.described.keys() - a.described.keys(), key=natural):
        done.add(name, f"only in the second: {name}")
    common = {}
    for name, entry in a.described.items():
        other_entry = b.described.get(name)
        if other_entry is not None and other_entry.shape != entry.shape:
            done.add(name, f"{name}: {list(entry.shape)} -> {list(other_entry.shape)}")
        elif other_entry is not None:
            common[name] = entry
    for name, was, now in pairs(a.read, b.read, common):
        found = difference(name, was, now)
        kinds = f"{was.dtype} -> {now.dtype}".replace("torch.", "") if was.dtype != now.dtype else ""
        values = f"{found.differing:,} of {was.numel():,} differ, by {found.max_abs:.3g} at most" if found else ""
        if found or kinds:
            done.add(name, f"{name}: " + (", ".join(filter(None, (kinds, values or "the same values")))))
        else:
            done.same += 1
    return done
