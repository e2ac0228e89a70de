"""The history of a run's mixture, as checkpoints record it: sources added or removed, weights changed.

A change takes effect at the first window of which nothing has been consumed; the window in progress is finished as
planned. The document count of each source continues, so that no document is lost or repeated in its epoch. The order is
a pure function of seed and history, independent of world size and readers.

    recorded = to_json(stream, consumed_rows, earlier)                          # into the checkpoint
    stream, change = resume(sources, order, recorded, consumed_rows, open_it)   # out of it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError
from megamm.data.pipeline.mixture import Mixture, Source
from megamm.data.pipeline.packing import Forms
from megamm.data.pipeline.row_stream import Place, RowStream
from megamm.data.pipeline.token_dataset import DocumentKind, TokenDataset
from megamm.model.vocabulary import Vocabulary


@dataclass(frozen=True)
class OpenSource:
    """A source of the config with its opened training split."""

    path: Path
    weight: float
    samples: TokenDataset


@dataclass(frozen=True)
class Order:
    """Everything besides the mixture that determines the rows."""

    seed: int
    row_length: int
    vocabulary: Vocabulary
    forms: Forms


@dataclass(frozen=True)
class Change:
    """A change of the mixture from row `row` on, as text."""

    row: int
    what: str


def source_names(paths: Sequence[Path]) -> list[str]:
    """Short distinct names of the sources: last parts of their paths, so that moved data keeps its order."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def begin(sources: Sequence[OpenSource], order: Order) -> RowStream:
    """The rows of a new run."""
    mixture = Mixture(_described(source_names([s.path for s in sources]), sources), order.seed)
    return RowStream([s.samples for s in sources], mixture, order.vocabulary, order.row_length, order.forms)


def to_json(stream: RowStream, consumed_rows: int, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The record for a checkpoint after `consumed_rows`; earlier: the record of the checkpoint resumed from."""
    described = dict(earlier["sources"]) if earlier else {}
    for source, samples in zip(stream.mixture.sources, stream.sample_sets, strict=True):
        if samples is not None:
            path = str(samples.folder.parent)
            entry = {"documents": source.documents, "shards": source.shards, "path": path, "kind": samples.kind}
            described[source.name] = entry
    place = stream.place(consumed_rows)
    return {
        "window": place.window,
        "first_row": place.row,
        "sources": described,
        "segments": [
            {"window": segment.window, "weights": {s.name: s.weight for s in segment.sources}}
            for segment in stream.mixture.segments
        ],
    }


def resume(
    sources: Sequence[OpenSource],
    order: Order,
    recorded: dict[str, Any],
    consumed_rows: int,
    open_removed: Callable[[Path, DocumentKind], TokenDataset],
) -> tuple[RowStream, Change | None]:
    """The rows of a run that resumes after `consumed_rows`, with the change of its mixture if the config has one.

    Raises UserError if a source's shards have changed, or a removed source is still needed and missing.
    """
    names = _recorded_names([s.path for s in sources], recorded)
    now = _described(names, sources)
    mixture = before = _mixture(recorded, order.seed)
    place = Place(recorded["window"], recorded["first_row"])
    change_at = place.window + (consumed_rows > place.row)
    if before.has_shares_of(now):
        before.require_same(now)
    else:
        mixture = before.then(change_at, now)
    sets: dict[str, TokenDataset] = dict(zip(names, (s.samples for s in sources), strict=True))
    for source, documents in zip(mixture.sources, mixture.counts_in(place.window), strict=True):
        if documents and source.name not in sets:
            sets[source.name] = _open_removed(source, recorded["sources"][source.name], open_removed)
    ordered = [sets.get(source.name) for source in mixture.sources]
    stream = RowStream(ordered, mixture, order.vocabulary, order.row_length, order.forms, place)
    if mixture is before:
        return stream, None
    return stream, Change(stream.first_row(change_at), _in_words(before.segments[-1].sources, now))


def _open_removed(
    source: Source, entry: dict[str, Any], open_removed: Callable[[Path, DocumentKind], TokenDataset]
) -> TokenDataset:
    """Open a source no longer in the config, for the rest of the window in progress."""
    try:
        samples = open_removed(Path(entry["path"]), entry["kind"])
        Mixture([source], 0).require_same([Source(source.name, 1.0, len(samples), samples.digest)])
    except UserError as error:
        what = f"source {source.name!r} was removed from the config, but the current window of rows still needs it: "
        remedy = "restore its shards until the run has written the first checkpoint after the change"
        raise UserError(what + error.what, where=error.where or entry["path"], remedy=remedy) from None
    return samples


def _mixture(recorded: dict[str, Any], seed: int) -> Mixture:
    def sources(weights: dict[str, float]) -> list[Source]:
        entries = recorded["sources"]
        return [Source(n, w, entries[n]["documents"], entries[n]["shards"]) for n, w in weights.items()]

    first, *others = recorded["segments"]
    mixture = Mixture(sources(first["weights"]), seed)
    for segment in others:
        mixture = mixture.then(segment["window"], sources(segment["weights"]))
    return mixture


def _described(names: Sequence[str], sources: Sequence[OpenSource]) -> list[Source]:
    return [Source(n, s.weight, len(s.samples), s.samples.digest) for n, s in zip(names, sources, strict=True)]


def _recorded_names(paths: Sequence[Path], recorded: dict[str, Any]) -> list[str]:
    """Names of the config's sources: a recorded name if the path or its end is the same, otherwise a new one."""
    by_path = {Path(entry["path"]): name for name, entry in recorded["sources"].items()}
    names: dict[Path, str] = {path: by_path[path] for path in paths if path in by_path}
    for path in (path for path in paths if path not in names):
        matching = [
            n for n in recorded["sources"] if f"/{path.as_posix()}".endswith(f"/{n}") and n not in names.values()
        ]
        if matching:
            names[path] = max(matching, key=len)
    for path in (path for path in paths if path not in names):
        depths = range(1, len(path.parts) + 1)
        taken = {*names.values(), *recorded["sources"]}
        new = ["/".join(path.parts[-depth:]) for depth in depths]
        names[path] = next((name for name in new if name not in taken), new[-1])
    return [names[path] for path in paths]


def _in_words(before: Sequence[Source], now: Sequence[Source]) -> str:
    """ "emoji 0.7 -> 0.5, clipart removed, sprites 0.5 (new)", as shares of the documents."""
    old, new = ({s.name: s.weight / sum(x.weight for x in sources) for s in sources} for sources in (before, now))
    words = [f"{n} {old[n]:.3g} -> {new[n]:.3g}" if n in new else f"{n} removed" for n in old]
    return ", ".join(words + [f"{n} {share:.3g} (new)" for n, share in new.items() if n not in old])
