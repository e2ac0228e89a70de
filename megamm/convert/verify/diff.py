"""`megamm convert diff`: compares the weights of two checkpoints, folders or files, whatever their formats.

Two native checkpoints are compared under their own names; a native one and anything else under the names of its
transformers family. A different dtype counts as a difference; the values are compared anyway.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megamm.checkpoint.whole_tensors import difference, pairs
from megamm.convert.io.tensor_sources import is_native, layer_of, natural, open_place


@dataclass
class Diff:
    """A sentence for each difference, the tensors concerned, and the number of identical tensors."""

    lines: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    same: int = 0

    def add(self, name: str, line: str) -> None:
        self.names.append(name)
        self.lines.append(line)

    @property
    def first_layer(self) -> int | None:
        """The first layer that has a difference; None if no layer has one."""
        layers = [layer for layer in map(layer_of, self.names) if layer is not None]
        return min(layers) if layers else None


def compare(one: Path, other: Path) -> Diff:
    """Compare two places. Raises UserError if one is unreadable, or if no family has a model that needs one."""
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
