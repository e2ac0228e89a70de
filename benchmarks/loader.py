"""The loader on a CPU: samples and rows per second and the CPU share, against webdataset and megatron-energon.

All sides read the same token shards (caption and image of a sample from two aligned folders of tars) and return batches
of the same shape, with rows from the same `packing.pack`. webdataset reads both folders sequentially in step; energon
reads them as a join of two crude datasets, unshuffled, with its savable loader, after its own `energon prepare`. Both
pack documents in the order they come (next fit), energon in buffers; ours reads members at random as planned. The sides
take turns, medians over the rounds. CPU share: processor seconds of the process and its workers per second.
energon is not in the requirements files, as it needs a different python-dateutil than the pinned one. Use a separate
environment: `pip install megatron-energon==7.4.1 -c FILE`, with the installed torch in FILE. A side that cannot run is
named with the reason.
Run: `python benchmarks/loader.py [--json OUT]`.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

from megamm import __version__
from megamm.common.sample import Batch, Document, Part, Row
from megamm.config import ModelConfig
from megamm.data.pipeline.loader import Loader, Reading
from megamm.data.pipeline.mixture import Mixture, MixtureSource
from megamm.data.pipeline.packing import PackingSpec, document_length, pack
from megamm.data.pipeline.row_stream import RowStream
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.modalities.protocol import sequential_positions
from megamm.model.flops import flops_of_row
from megamm.model.vocabulary import Vocabulary
from megamm.shards.folder import ShardWriter, tokens_from_bytes, tokens_to_bytes

CODECS = {"text": "t", "image": "i"}
VOCABULARY = Vocabulary.of({"text": (4096, "t"), "image": (4096, "i")})
PACKING = {"text": PackingSpec(sequential_positions, False), "image": PackingSpec(sequential_positions, True)}
ROW, MICRO_BATCH, IMAGE_TOKENS, SAMPLES = 2048, 4, 64, 6000
PEERS = ("webdataset", "megatron-energon")
ENERGON_BUFFER = 500
"""Documents energon packs together: 18 rows."""

MODEL_8B = ModelConfig(
    num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8, head_dim=128
)

Item = TypeVar("Item")


def write_shards(folder: Path) -> None:
    """Write SAMPLES samples of a caption and an image, in token shards of 500."""
    generator = np.random.default_rng(0)
    for name, codec in CODECS.items():
        with ShardWriter(folder / f"{name}.tokens-{codec}", samples_per_shard=500) as writer:
            for i in range(SAMPLES):
                size = IMAGE_TOKENS if name == "image" else int(generator.integers(2, 14))
                writer.add(f"s{i:06d}", "npy", tokens_to_bytes(generator.integers(0, 4096, size), 4096), tokens=size)


def our_batches(folder: Path, workers: int) -> Iterator[Batch]:
    """Yield microbatches from the loader, one per step."""
    dataset = TokenDataset(folder, CODECS)
    stream = RowStream([dataset], Mixture([MixtureSource("s", 1, len(dataset))], 0), VOCABULARY, ROW, PACKING)
    loader = Loader(
        stream,
        global_batch=MICRO_BATCH,
        micro_batch=MICRO_BATCH,
        data_rank=0,
        data_size=1,
        cost=lambda lengths: flops_of_row(MODEL_8B, 150_000, ROW, lengths),
        reading=Reading(workers, prefetch=4),
    )
    while True:
        yield from loader.step()


def by_next_fit(items: Iterable[Item], document: Callable[[Item], Document]) -> Iterator[list[Item]]:
    """Group documents into rows in their order: a new row where the next document does not fit."""
    waiting: list[Item] = []
    used = 0
    for item in items:
        length = document_length(*document(item).sizes)
        if used + length > ROW:
            yield waiting
            waiting, used = [], 0
        waiting, used = [*waiting, item], used + length
    yield waiting


def packed_in_order(documents: Iterator[Document]) -> Iterator[Batch]:
    """Yield microbatches of documents in the order they come."""
    rows: list[Row] = []
    for row in by_next_fit(documents, lambda document: document):
        rows.append(pack(row, VOCABULARY, ROW, PACKING))
        if len(rows) == MICRO_BATCH:
            yield Batch.stack(rows)
            rows = []


class WebDatasetRows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Runs in a worker of WebLoader: reads two aligned folders in step, repeatedly."""

    def __init__(self, folder: Path) -> None:
        self.urls = {
            name: sorted(map(str, (folder / f"{name}.tokens-{codec}").glob("*.tar"))) for name, codec in CODECS.items()
        }

    def __iter__(self) -> Iterator[Batch]:
        return packed_in_order(self._documents())

    def _documents(self) -> Iterator[Document]:
        import webdataset

        while True:
            folders = [
                webdataset.WebDataset(urls, shardshuffle=False, empty_check=False) for urls in self.urls.values()
            ]
            for samples in zip(*folders, strict=True):
                parts = (Part(n, tokens_from_bytes(s["npy"])) for n, s in zip(self.urls, samples, strict=True))
                yield Document(samples[0]["__key__"], tuple(parts))


def webdataset_batches(folder: Path, workers: int) -> Iterator[Batch]:
    """Yield microbatches from WebLoader."""
    import webdataset

    return iter(webdataset.WebLoader(WebDatasetRows(folder), batch_size=None, num_workers=workers))


def joined(**samples: dict[str, Any]) -> dict[str, Any]:
    """Join the sample of each modality to one with the document (energon's joiner, named in energon.yaml)."""
    parts = (Part(name, tokens_from_bytes(sample["npy"])) for name, sample in samples.items())
    document = Document(samples["text"]["__key__"], tuple(parts))
    return {"document": document, "__restore_key__": ()}  # energon sets the key itself, where there is one


def prepare_energon(folder: Path) -> None:
    """Write energon's metadata: `energon prepare` of each folder, and energon.yaml, which joins them by key."""
    paths = {name: f"{name}.tokens-{codec}" for name, codec in CODECS.items()}
    join = {name: {"path": path} for name, path in paths.items()}
    split = {"join": join, "joiner": {"__module__": __name__, "__function__": joined.__name__}}
    metadataset = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": split}}
    (folder / "energon.yaml").write_text(json.dumps(metadataset))  # JSON is valid YAML
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", "--non-interactive"]
    command += ["--split-parts", "train:.*", "--sample-type", "CrudeWebdataset", "--num-workers", "1"]
    for path in (*paths.values(), "energon.yaml"):
        subprocess.run([*command, str(folder / path)], check=True, capture_output=True, timeout=120)


def energon_batches(folder: Path, workers: int) -> Iterator[Batch]:
    """Yield microbatches from energon's savable loader, packed by its packing dataset."""
    energon = importlib.import_module("megatron.energon")

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc, name-defined]
        decoder = None  # members are bytes, as for the other sides

        def select_samples_to_pack(self, samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
            return list(by_next_fit(samples, lambda sample: sample["document"]))

        @energon.stateless  # type: ignore[untyped-decorator]
        def pack_selected_samples(self, samples: list[dict[str, Any]]) -> Row:
            return pack([sample["document"] for sample in samples], VOCABULARY, ROW, PACKING)

        @energon.stateless  # type: ignore[untyped-decorator]
        def batch(self, samples: list[Row]) -> Batch:
            return Batch.stack(samples)

    with contextlib.redirect_stdout(sys.stderr):  # it prints what it joins
        dataset = energon.get_train_dataset(
            folder / "energon.yaml",
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
            batch_size=MICRO_BATCH,
            packing_buffer_size=ENERGON_BUFFER,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            parallel_shard_iters=1,
            task_encoder=Encoder(),
        )
    return iter(energon.get_savable_loader(dataset))


def measure(batches: Iterator[Batch], count: int) -> dict[str, float]:
    """Measure speeds and CPU share over that many microbatches."""
    me = psutil.Process()

    def cpu() -> float:
        processes = [me, *me.children(recursive=True)]
        return sum(sum(p.cpu_times()[:2]) for p in processes)

    for _ in range(12):  # more than is read ahead: later ones are read while the clock runs
        next(batches)
    documents, start, used = 0, time.perf_counter(), cpu()
    for _ in range(count):
        documents += int((next(batches).input_ids == VOCABULARY.document_start).sum())
    seconds = time.perf_counter() - start
    rows = count * MICRO_BATCH
    return {"samples_per_s": documents / seconds, "rows_per_s": rows / seconds, "cpu_share": (cpu() - used) / seconds}


def energon_obstacle() -> str | None:
    """Return why energon cannot be measured here; None if it can."""
    try:
        importlib.import_module("megatron.energon")
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None


def speed_table(rounds: int, count: int, with_energon: bool) -> dict[str, Any]:
    """Run all sides with 0, 1 and 2 workers in turns; print medians."""
    sides = {"ours": our_batches, "webdataset": webdataset_batches}
    if with_energon:
        sides["energon"] = energon_batches
    found: dict[str, list[dict[str, float]]] = {f"{s}, {w} workers": [] for w in (0, 1, 2) for s in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder)
        if with_energon:
            prepare_energon(folder)
        for _ in range(rounds):
            for name, measured in found.items():
                side, workers = name.removesuffix(" workers").split(", ")
                measured.append(measure(sides[side](folder, int(workers)), count))
                gc.collect()  # ends its workers
    table = {n: {k: statistics.median(m[k] for m in measured) for k in measured[0]} for n, measured in found.items()}
    for name, row in table.items():
        speeds = f"{row['samples_per_s']:>9,.0f} samples/s {row['rows_per_s']:>7,.0f} rows/s"
        per_cpu = row["samples_per_s"] / row["cpu_share"]
        print(f"{name:<24} {speeds}  CPU share {row['cpu_share']:.2f}  {per_cpu:>7,.0f} samples per CPU second")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=40, help="microbatches per side and round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    obstacle = energon_obstacle()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    result: dict[str, Any] = {
        "command": (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "megamm": __version__, "torch": torch.__version__},
        "rounds": options.rounds,
        "load_before": os.getloadavg(),
    }
    result["versions"] |= {name: version(name) for name in PEERS if name != "megatron-energon" or not obstacle}
    if obstacle:
        print(f"energon is not measured: {obstacle}")
        result["not_measured"] = {"energon": obstacle}
    result["speed"] = speed_table(options.rounds, options.microbatches, with_energon=not obstacle)
    result["load_after"] = os.getloadavg()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
