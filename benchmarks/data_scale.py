"""Data sets of up to a billion samples: time and memory to open one, and time to plan and to find its samples.

The indexes are complete, of captions and images (`--modalities`); the tars are sparse files with one real member each.
The lengths repeat after a million samples, the keys do not; about one caption in 100,000 is longer than a row. Every
size is measured in new processes, one for each state of the page cache:
    first     the index has just been written out of the page cache; no pass over the lengths has been kept
    cold      the same, but with the kept pass
    warm      the index is in the page cache as far as the earlier process read it
Memory is that of the process above what its imports take: anonymous, and pages of mapped files, which all processes
share. Run: `python benchmarks/data_scale.py [FOLDER] [--samples 1e6 1e8 1e9] [--json OUT]`. A pair takes 36 bytes.
"""

import argparse
import io
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megamm import __version__
from megamm.common.files import new_file
from megamm.common.sample import IntArray
from megamm.data.pipeline.packing import PackingSpec
from megamm.data.pipeline.run_data import OpenSource, StreamOptions, begin_stream
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.modalities.protocol import sequential_positions
from megamm.model.vocabulary import Vocabulary
from megamm.shards.columns import Column, columns_of, write_columns
from megamm.shards.folder import tokens_to_bytes
from megamm.shards.index import INDEX, ZONE, IndexBuilder

ROW, TAR, CHUNK = 4096, 50_000, 1_000_000
"""Tokens of a row, members of a tar, members after which the lengths repeat."""
CODECS = {"text": "t", "image": "i"}
BLOCK, NPY_HEADER = 512, 128
WINDOWS, LOOKUPS = 4, 5_000
LONG = 100_000
"""One caption in so many is longer than a row."""


def lengths(modality: str) -> IntArray:
    """Return the tokens of the parts of CHUNK samples."""
    numbers = np.arange(CHUNK)
    if modality == "image":
        return np.full(CHUNK, 256, dtype=np.int64)
    mixed = (numbers * 2654435761 >> 7) & 0xFFFFF
    return np.where(mixed % LONG == 0, 6000, 4 + mixed % 60)


def write_cache(folder: Path, modality: str, samples: int) -> None:
    """Write the token cache of one modality: the whole index, and tars with one member each.

    The index of the first CHUNK samples is that of a build. All others have the same numbers, and their own keys.
    """
    folder.mkdir(parents=True)
    tokens, tars = lengths(modality), []
    size = NPY_HEADER + 2 * tokens
    # Ten digits: those of the chunk, and those inside of it.
    last = (np.arange(CHUNK)[:, None] // 10 ** np.arange(5, -1, -1) % 10 + ord("0")).astype(np.uint8)
    content = io.BytesIO()
    index = IndexBuilder(io.BytesIO())
    for first in range(0, CHUNK, TAR):
        here = slice(first, first + TAR)
        blocks = BLOCK + -(-size[here] // BLOCK) * BLOCK
        ends = np.cumsum(blocks)
        tars.append(int(ends[-1]) + 2 * BLOCK)
        keys = np.hstack((np.full((TAR, 4), ord("0"), dtype=np.uint8), last[here])).view("S10")[:, 0]
        index.append(keys, "npy", np.stack((ends - blocks + BLOCK, size[here], tokens[here])), tars[-1])
    index.write(content)
    one, chunks = columns_of(content.getbuffer()), samples // CHUNK
    columns = [
        Column(name, one.arrays[name].dtype, (samples,), itertools.repeat(one.arrays[name], chunks))
        for name in ("offset", "size", "tokens")
    ]
    columns += [
        Column.of("first", np.arange(samples // TAR + 1) * TAR),
        Column.of("tar_bytes", np.tile(one.arrays["tar_bytes"], chunks)),
        Column.of("most_tokens", most_of_zones(tokens, samples)),
        Column("key", np.dtype("<u1"), (samples, 10), keys_of(last, chunks)),
    ]
    with new_file(folder / INDEX) as file:
        write_columns(file, columns, one.metadata)
    for shard in range(samples // TAR):
        key = f"{shard * TAR:010d}"
        write_tar(folder / f"{shard:06d}.tar", key, int(tokens[shard * TAR % CHUNK]), tars[shard % len(tars)])


def keys_of(last: np.ndarray, chunks: int) -> Iterator[np.ndarray]:
    """Yield the keys of every chunk, as digits `[CHUNK, 10]`."""
    digits = np.hstack((np.empty((CHUNK, 4), dtype=np.uint8), last))
    for chunk in range(chunks):
        digits[:, :4] = np.frombuffer(f"{chunk:04d}".encode(), dtype=np.uint8)
        yield digits


def most_of_zones(tokens: IntArray, samples: int) -> IntArray:
    """Return the largest length of each zone of samples that repeat these lengths."""
    twice = np.concatenate((tokens, tokens))
    starts = np.arange(0, samples, ZONE)
    stops = np.minimum(starts + ZONE, samples)
    return np.array([twice[start % CHUNK :][: stop - start].max() for start, stop in zip(starts, stops, strict=True)])


def member_bytes(key: str, tokens: int) -> bytes:
    """Return a member of the tar, with its header."""
    info = tarfile.TarInfo(f"{key}.npy")
    data = tokens_to_bytes(np.arange(tokens) % 64, 64)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data


def write_tar(path: Path, key: str, tokens: int, tar_bytes: int) -> None:
    """Write a sparse tar of this size with its first member."""
    with path.open("wb") as file:
        file.write(member_bytes(key, tokens))
        file.truncate(tar_bytes)


def memory() -> dict[str, float]:
    """Return this process's memory, and its pages of mapped files, in MB."""
    values = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        values[name.rstrip(":")] = int(value) / 1024
    # Pages of a file that only this process has mapped count as private in this file, though others would share them.
    return {"anonymous": values["Anonymous"], "mapped": values["Rss"] - values["Anonymous"]}


def measure(split: Path) -> dict[str, Any]:
    """Open the split as a run does, plan windows, and look samples up; in a process that has done nothing else."""
    before = memory()
    begin = clock()
    dataset = TokenDataset(split, CODECS)
    opened = clock()
    vocabulary = Vocabulary.of({name: (1000, codec) for name, codec in CODECS.items()})
    packing = {name: PackingSpec(sequential_positions, False) for name in CODECS}
    stream = begin_stream([OpenSource(split.parent, 1.0, dataset)], StreamOptions(1, ROW, vocabulary, packing))
    found = str(dataset.long_samples(ROW))
    ready = clock()
    after_open = memory()
    seconds = list[np.ndarray]()
    for window in range(WINDOWS):
        start = clock()
        stream.first_row(window + 1)
        seconds.append(clock() - start)
    after_windows = memory()
    samples = np.random.default_rng(time.time_ns()).integers(0, len(dataset), LOOKUPS).tolist()
    start = clock()
    for i in samples:
        dataset.plan(i, 0, ROW)
    lookups = LOOKUPS / (clock() - start)
    return {
        "open_s": times(opened - begin),
        "ready_s": times(ready - begin),
        "used": stream.mixture.sources[0].documents,
        "found": found.removeprefix(f"{split}: "),
        "first_window_s": times(seconds[0]),
        "window_s": times(np.median(seconds[1:], axis=0)),
        "lookups_per_s": times(lookups),
        "memory_after_open_mb": {name: round(after_open[name] - before[name], 1) for name in before},
        "memory_after_windows_mb": {name: round(after_windows[name] - before[name], 1) for name in before},
        "imports_mb": {name: round(value, 1) for name, value in before.items()},
    }


def clock() -> np.ndarray:
    """Return the wall clock and the processor time of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def times(pair: np.ndarray) -> dict[str, float]:
    """Return both times by name; on a busy machine they differ."""
    return {"wall": round(float(pair[0]), 4), "processor": round(float(pair[1]), 4)}


def forget(split: Path) -> None:
    """Drop the index from the page cache."""
    for file in split.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_size(folder: Path, samples: int, modalities: list[str]) -> dict[str, Any]:
    """Write a split of that many samples, and measure it in new processes."""
    split = folder / f"{samples}" / "train"
    start = time.perf_counter()
    for modality in modalities:
        if not (split / f"{modality}.tokens-{CODECS[modality]}").exists():
            write_cache(split / f"{modality}.tokens-{CODECS[modality]}", modality, samples)
    result: dict[str, Any] = {"samples": samples, "modalities": modalities, "written_s": time.perf_counter() - start}
    result["index_bytes"] = sum(file.stat().st_size for file in split.rglob(INDEX))
    for kept in split.glob(".used-*"):
        kept.unlink()
    for state in ("first", "cold", "warm"):
        if state != "warm":
            forget(split)
        command = [sys.executable, __file__, str(split), "--measure"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result[state] = json.loads(done.stdout.splitlines()[-1])
        print(samples, state, json.dumps(result[state]), flush=True)
    return result


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder for the data sets; default: a temporary one")
    parser.add_argument("--samples", type=float, nargs="+", default=[1e6])
    parser.add_argument("--modalities", nargs="+", choices=list(CODECS), default=list(CODECS))
    parser.add_argument("--keep", action="store_true", help="keep the data sets")
    parser.add_argument("--measure", action="store_true", help="measure the split FOLDER in this process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder)))
        return
    sizes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for samples in map(int, options.samples):
            load = os.getloadavg()[0]
            sizes.append(measure_size(folder, samples, options.modalities) | {"load_before": load})
            if not options.keep:
                shutil.rmtree(folder / f"{samples}")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if options.json:
        result = {"machine": machine, "megamm": __version__, "row_length": ROW, "sizes": sizes}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
