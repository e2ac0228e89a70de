"""No sample is lost or repeated over kill -9, other world sizes, readers and sources: each one is counted.

Real processes take rows from the loader and are killed; rows count if all ranks of a world have logged them, as with a
checkpoint. The sum over all worlds is compared with the sequence read in one go, and that sequence with an epoch.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import loader_worker
import numpy as np
import psutil
import pytest
import warm
from read_rows import read_row
from tiny_run import environment

from megamm.common.errors import UserError
from megamm.common.sample import Batch
from megamm.data.pipeline.mixture import BLOCK
from megamm.shards.folder import ShardWriter, tokens_to_bytes

SIZES = {"a": 230, "b": 57, "c": 101}
BEFORE, AFTER = {"a": 3.0, "b": 1.0}, {"c": 1.0, "a": 1.0}


def write_source(folder, number, samples, image_tokens=20):
    """Write samples of two text tokens that name them and an image of 3 to `image_tokens` tokens."""
    generator = np.random.default_rng(number)
    for name, codec in loader_worker.CODECS.items():
        with ShardWriter(folder / "train" / f"{name}.tokens-{codec}", samples_per_shard=50) as writer:
            for i in range(samples):
                ids = (
                    [number, i] if name == "text" else generator.integers(0, 4096, generator.integers(3, image_tokens))
                )
                writer.add(f"s{i:04d}", "npy", tokens_to_bytes(np.array(ids), 4096), tokens=len(ids))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    for number, (name, samples) in enumerate(SIZES.items()):
        write_source(path / name, number, samples)
    return path


def run_world(folder, name, size, state, *, kill_after=0, steps=1_000_000, weights=BEFORE, **reading):
    """Start that many ranks from `state`; kill -9 them all when one has written kill_after steps, or let them end.

    Returns the state that every rank has reached, and the texts of the steps up to it.
    """
    rank_options = {"workers": 0, "prefetch": 1, "micro_batch_size": 1} | reading
    spec = {"folder": str(folder), "name": name, "world_size": size, "steps": steps, "weights": weights}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(spec | state | rank_options))
    worker = [sys.executable, str(Path(loader_worker.__file__)), str(path)]
    ranks = [warm.start([*worker, str(rank)], env=environment()) for rank in range(size)]
    logs = [folder / f"{name}.rank{rank}.jsonl" for rank in range(size)]
    children = []
    if kill_after:
        while any(rank.poll() is None for rank in ranks) and min(map(written, logs)) < kill_after:
            time.sleep(0.01)
        children = [child for rank in ranks for child in psutil.Process(rank.pid).children(recursive=True)]
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
    assert [rank.wait(timeout=120) for rank in ranks] == [-signal.SIGKILL if kill_after else 0] * size
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive, "data workers outlive the rank that they read for"
    steps_of = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    done = min(len(steps) for steps in steps_of)  # steps that not all ranks have logged do not count
    texts = Counter(tuple(text) for steps in steps_of for step in steps[:done] for text in step["texts"])
    last = steps_of[0][done - 1]
    return {"consumed_rows": last["consumed_rows"], "recorded": last["mixture"]}, texts


def written(log):
    return log.read_bytes().count(b"\n") if log.exists() else 0


def count_rows(stream, first, stop):
    """Count samples in rows [first, stop) of a stream, by their texts."""
    batches = [Batch.stack([read_row(stream, r)]) for r in range(first, stop)]
    return Counter(tuple(text) for text in loader_worker.texts(batches))


def test_every_sample_is_counted_over_kills_resizes_and_another_mixture(folder):
    state, seen = {"consumed_rows": 0, "recorded": None}, Counter()
    worlds = [
        ("one", 1, {"kill_after": 3, "workers": 1, "prefetch": 3}),
        ("two", 2, {"kill_after": 4, "micro_batch_size": 3}),
        ("three", 3, {"kill_after": 2, "weights": AFTER, "workers": 2, "micro_batch_size": 2}),
        ("four", 4, {"kill_after": 5, "weights": AFTER}),
    ]
    for name, size, options in worlds:
        before = state["consumed_rows"]
        state, texts = run_world(folder, name, size, state, **options)
        assert state["consumed_rows"] >= before + options["kill_after"] * loader_worker.GLOBAL_BATCH
        seen += texts
    segments = state["recorded"]["segments"]
    assert [segment["weights"] for segment in segments] == [BEFORE, AFTER]
    # The same sequence in one go; the last world continues to the end of a block after the change.
    first = state["recorded"] | {"window": 0, "first_row": 0}
    stream, change = loader_worker.open_stream(folder, AFTER, first, 0)
    assert change is None
    last_block = max(segments[1]["window"], stream.block_start(state["consumed_rows"]).block) + 1
    end = stream.first_row(last_block)
    steps = -(-(end - state["consumed_rows"]) // loader_worker.GLOBAL_BATCH)
    state, texts = run_world(folder, "last", 2, state, steps=steps, weights=AFTER, workers=1)
    seen += texts
    consumed = state["consumed_rows"]
    assert end <= consumed < end + loader_worker.GLOBAL_BATCH
    assert seen == count_rows(stream, 0, consumed)
    # That sequence has every sample of a source equally often, except for the epoch in progress.
    counts = stream.mixture.counts(last_block * BLOCK)
    whole = seen - count_rows(stream, end, consumed)
    for number, (name, samples) in enumerate(SIZES.items()):
        drawn = counts[[s.name for s in stream.mixture.sources].index(name)]
        times = [whole[number, i] for i in range(samples)]
        assert sum(times) == drawn and {drawn // samples} <= set(times) <= {drawn // samples, -(-drawn // samples)}
    assert sum(whole.values()) == last_block * BLOCK


def resumed(folder, weights, stream, consumed, earlier=None):
    """Return the resumed stream; earlier is the schedule that it was resumed from."""
    recorded = json.loads(json.dumps(loader_worker.schedule_to_json(stream, consumed, earlier)))
    return loader_worker.open_stream(folder, weights, recorded, consumed)


def test_a_change_waits_for_the_block_in_progress(folder):
    stream, _ = loader_worker.open_stream(folder, BEFORE, None, 0)
    boundary = stream.first_row(1)
    for consumed, block in ((1, 1), (boundary - 1, 1), (boundary, 1), (boundary + 1, 2)):
        changed, change = resumed(folder, AFTER, stream, consumed)
        assert change is not None and change.row == stream.first_row(block)
        assert change.what == "a 0.75 -> 0.5, b removed, c 0.5 (new)"
        for r in {consumed, change.row - 1} - {boundary - 1} | {boundary + 1}:
            same = (
                np.array_equal(read_row(changed, r).input_ids, read_row(stream, r).input_ids)
                if r >= changed.start.row
                else True
            )
            assert same == (r < change.row or r < changed.start.row)
        again, none = resumed(
            folder, AFTER, changed, change.row + 7, loader_worker.schedule_to_json(stream, consumed, None)
        )
        assert none is None and np.array_equal(
            read_row(again, change.row + 9).input_ids, read_row(changed, change.row + 9).input_ids
        )


def test_a_config_in_another_order_or_scale_changes_nothing(folder):
    stream, _ = loader_worker.open_stream(folder, BEFORE, None, 0)
    same, change = resumed(folder, {"b": 0.5, "a": 1.5}, stream, 500)
    assert change is None
    assert all(np.array_equal(read_row(same, r).input_ids, read_row(stream, r).input_ids) for r in (500, 501, 1800))


def test_a_change_that_never_came_is_forgotten(folder):
    stream, _ = loader_worker.open_stream(folder, BEFORE, None, 0)
    changed, _ = resumed(folder, AFTER, stream, 5)
    other, change = resumed(folder, {"a": 1.0, "b": 1.0}, changed, 17)
    assert change is not None and [len(s.sources) for s in other.mixture.segments] == [2, 2]
    assert [s.block for s in other.mixture.segments] == [0, 1]


def test_other_shards_under_the_name_are_refused(folder, tmp_path):
    for number, (name, samples) in enumerate(SIZES.items()):
        write_source(tmp_path / name, number, samples - (name == "a"))
    stream, _ = loader_worker.open_stream(folder, BEFORE, None, 0)
    recorded = loader_worker.schedule_to_json(stream, 100, None)
    with pytest.raises(UserError, match=r"source 'a' have changed .*229 samples now, 230 before.*restore"):
        loader_worker.open_stream(tmp_path, BEFORE, recorded, 100)
    moved = {name: entry | {"path": f"/elsewhere/{name}"} for name, entry in recorded["sources"].items()}
    stream, change = loader_worker.open_stream(folder, BEFORE, recorded | {"sources": moved}, 100)
    assert change is None  # moved data is recognised by the end of its path
    with pytest.raises(
        UserError, match=r"source 'b' was removed .*current block of rows still needs it.*restore its shards"
    ):
        loader_worker.open_stream(folder, {"a": 1.0}, recorded | {"sources": moved}, 100)
