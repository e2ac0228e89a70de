"""The loader: the same rows for any number of data ranks, exact resume, and clear errors for missing caches."""

import os
import signal
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from older_index import change_columns
from read_rows import read_row
from tiny_run import environment

from megamm.common.errors import UserError
from megamm.common.sample import PackedLengths
from megamm.data.pipeline.balance import assign, imbalance
from megamm.data.pipeline.loader import Loader, Reading
from megamm.data.pipeline.mixture import Mixture, MixtureSource, source_names
from megamm.data.pipeline.packing import PackingSpec, document_length
from megamm.data.pipeline.row_stream import RowStream
from megamm.data.pipeline.run_data import PositionTable
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.modalities.protocol import sequential_positions
from megamm.model.vocabulary import Vocabulary
from megamm.shards.folder import ShardWriter, tokens_to_bytes

TEXT, IMAGE = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
CODECS = {"text": TEXT, "image": IMAGE}
VOCABULARY = Vocabulary.of({"text": (300, TEXT), "image": (64, IMAGE)})
PACKING = {"text": PackingSpec(sequential_positions, False), "image": PackingSpec(sequential_positions, True)}
ROW = 64


def caches(split, samples, seed, image=9, without_image=(), longest=12):
    """Write token caches of a split: text `number * 10 ...`-like random ids, images of constant length."""
    generator = np.random.default_rng(seed)
    with ShardWriter(split / f"text.tokens-{TEXT}", samples_per_shard=20) as writer:
        for i in range(samples):
            ids = generator.integers(0, 300, size=int(generator.integers(1, longest)))
            writer.add(f"s{i:04d}", "npy", tokens_to_bytes(ids, 300), tokens=ids.size)
    if image:
        with ShardWriter(split / f"image.tokens-{IMAGE}", samples_per_shard=20) as writer:
            for i in range(samples):
                ids = generator.integers(0, 64, size=image)
                if i not in without_image:
                    writer.add(f"s{i:04d}", "npy", tokens_to_bytes(ids, 64), tokens=ids.size)
    return split


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    pairs = TokenDataset(caches(folder / "pairs" / "train", 45, seed=1, without_image={3, 44}), CODECS)
    texts = TokenDataset(caches(folder / "texts" / "train", 30, seed=2, image=0, longest=200), CODECS)
    return [pairs, texts]


def stream(sets, seed=7):
    mixture = Mixture([MixtureSource("pairs", 3, len(sets[0])), MixtureSource("texts", 1, len(sets[1]))], seed)
    return RowStream(sets, mixture, VOCABULARY, ROW, PACKING)


def cost(lengths):
    """Return a row's cost, with expensive attention."""
    return ROW + sum(n * n for n in lengths) / 16


def loader(sets, size, rank, consumed=0, micro=2, **reading):
    return Loader(
        stream(sets),
        global_batch=12,
        micro_batch=micro,
        data_rank=rank,
        data_size=size,
        cost=cost,
        consumed_rows=consumed,
        reading=Reading(**reading),
    )


def rows_of_step(loaders):
    """Return the rows of one global batch as tuples, over all ranks, unordered."""
    return sorted(tuple(ids.tolist()) for one in loaders for batch in one.step() for ids in batch.input_ids)


def test_documents_are_the_tokens_that_were_cached(sets):
    pairs = sets[0]
    both, text = pairs.whole(0), pairs.whole(3)
    assert [p.modality for p in both.parts] == ["text", "image"] and both.key == "s0000"
    turned = pairs.read(pairs.plan(0, 1, ROW)[0])
    assert [p.modality for p in turned.parts] == ["image", "text"]
    assert [p.modality for p in text.parts] == ["text"]  # joined by key: sample 3 has no image
    for i in range(len(pairs)):
        document = pairs.whole(i)
        is_text_only = [p.modality for p in document.parts] == ["text"]
        assert pairs.needed(np.array([i]))[0] == (3 if is_text_only else document_length(*document.sizes))
        assert is_text_only == (i in (3, 44))


def test_rows_are_a_pure_function_of_their_number(sets):
    forward, backward = stream(sets), stream(sets)
    numbers = [0, 5, 900, 1, 2500]  # blocks are planned in order, and read in any order
    rows = {r: read_row(forward, r) for r in numbers}
    for r in reversed(numbers):
        assert np.array_equal(rows[r].input_ids, read_row(backward, r).input_ids)
        assert np.array_equal(rows[r].position, read_row(backward, r).position)
    assert not np.array_equal(read_row(stream(sets, seed=8), 0).input_ids, rows[0].input_ids)


def test_the_first_block_holds_every_document_that_the_mixture_drew(sets):
    rows = stream(sets)
    read_row(rows, 0)
    block = rows.mixture.block(0)
    drawn = [sets[s].whole(i) for s, i in zip(block.source.tolist(), block.sample.tolist(), strict=True)]
    wanted = sum(document_length(*document.sizes) for document in drawn)
    in_block = [read_row(rows, r) for r in range(rows.first_row(1))]
    marks = sum(int((row.input_ids == VOCABULARY.document_start).sum()) for row in in_block)
    used = sum(int((row.segment >= 0).sum()) for row in in_block)
    assert used - 2 * marks == wanted - 2 * len(block.source)  # pieces of long texts add marks and lose no token
    assert marks > len(block.source)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_step_has_the_same_rows_at_any_data_size(sets, size):
    loaders = [loader(sets, size, rank) for rank in range(size)]
    reference = stream(sets)
    for step in range(3):
        wanted = sorted(tuple(read_row(reference, r).input_ids.tolist()) for r in range(step * 12, step * 12 + 12))
        assert rows_of_step(loaders) == wanted


def test_resume_at_another_size_goes_on_where_it_stopped(sets):
    whole = [loader(sets, 1, 0)]
    expected = [rows_of_step(whole) for _ in range(5)]
    before = [loader(sets, 2, rank) for rank in range(2)]
    assert [rows_of_step(before) for _ in range(2)] == expected[:2]
    consumed = before[0].consumed_rows
    assert consumed == before[1].consumed_rows == 24
    after = [loader(sets, 3, rank, consumed=consumed) for rank in range(3)]
    assert [rows_of_step(after) for _ in range(3)] == expected[2:]


def test_microbatches_are_those_that_balance_assigns(sets):
    loaders, reference = [loader(sets, 2, rank) for rank in range(2)], stream(sets)
    steps = [one.step() for one in loaders]
    assert [b.input_ids.shape for b in steps[1]] == [(2, ROW)] * 3 and steps[1][0].position.shape == (2, 3, ROW)
    costs = [cost(reference.row_spec(r).lengths) for r in range(12)]
    rows = assign(costs, 2, 2)
    for rank, batches in enumerate(steps):
        for batch, numbers in zip(batches, rows[:, rank].tolist(), strict=True):
            assert batch.input_ids.tolist() == [read_row(reference, r).input_ids.tolist() for r in numbers]
    padded = np.mean([(read_row(reference, r).segment < 0).mean() for r in range(12)])
    for one in loaders:  # figures of the whole step, the same on every rank
        assert one.figures.padding_share == pytest.approx(padded)
        assert one.figures.imbalance == imbalance(costs, rows)[0] >= 1


def test_a_batch_that_does_not_divide_is_refused(sets):
    with pytest.raises(UserError, match="multiple of 10"):
        loader(sets, 5, 0)


def test_heldout_has_every_sample_once_in_each_order(sets):
    documents = [
        (d.key, tuple(p.modality for p in d.parts)) for i in range(len(sets[0])) for d in sets[0].documents(i, ROW)
    ]
    assert documents[:2] == [("s0000", ("text", "image")), ("s0000", ("image", "text"))]
    assert len(documents) == len(set(documents)) == 2 * 43 + 2


def test_a_pair_longer_than_a_row_is_named_before_the_run(sets, tmp_path):
    long = TokenDataset(caches(tmp_path / "long" / "train", 4, seed=1, image=70), CODECS)
    with pytest.raises(UserError, match=r"sample 's0000' needs 80 .* a row has 64 \(4 such samples, .*seq_length"):
        RowStream([long], Mixture([MixtureSource("long", 1, 4)], 0), VOCABULARY, ROW, PACKING)


def test_missing_caches_name_the_command(tmp_path):
    split = caches(tmp_path / "source" / "train", 3, seed=0)
    (split / "image").mkdir()
    with pytest.raises(UserError, match=r"no image tokens of codec other.*data tokenize .*source --codec NAME="):
        TokenDataset(split, {"text": TEXT, "image": "other"})
    with pytest.raises(UserError, match="megamm data build"):
        TokenDataset(tmp_path / "nowhere" / "train", CODECS)


def test_a_cache_that_lies_about_its_lengths_is_found(tmp_path):
    split = caches(tmp_path / "source" / "train", 3, seed=0)
    change_columns(split / f"image.tokens-{IMAGE}", lambda columns: columns["tokens"].fill(8))
    with pytest.raises(UserError, match="does not match the index"):
        TokenDataset(split, CODECS).whole(0)


def test_ids_of_a_larger_codec_are_refused(tmp_path):
    dataset = TokenDataset(caches(tmp_path / "source" / "train", 3, seed=0), CODECS)
    small = Vocabulary.of({"text": (300, TEXT), "image": (4, IMAGE)})
    rows = RowStream([dataset], Mixture([MixtureSource("source", 1, 3)], 0), small, ROW, PACKING)
    with pytest.raises(UserError, match=r"image token id .* its codec has 4"):
        read_row(rows, 0)


def test_moved_data_keeps_its_order():
    """The order is drawn from the sources' names, which must not depend on where the data is mounted."""
    here = [Path("/a/shards/pairs/v1"), Path("/a/shards/books/v1")]
    there = [Path("/mnt/b") / path.relative_to("/a") for path in here]
    assert source_names(here) == source_names(there) == ["pairs/v1", "books/v1"]
    assert source_names([Path("x/emoji"), Path("y/clipart")]) == ["emoji", "clipart"]
    assert source_names([Path("x/emoji"), Path("x/emoji")]) == ["x/emoji", "x/emoji"]  # Mixture refuses the pair


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_batches_of_the_process_itself(sets, workers):
    """The model's random state is also unchanged, and rows read ahead are not consumed."""
    own, ahead = loader(sets, 2, 1), loader(sets, 2, 1, workers=workers, prefetch=3)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for _ in range(5):
        for a, b in zip(own.step(), ahead.step(), strict=True):
            for name in ("input_ids", "labels", "loss_weight", "segment", "position", "modality"):
                assert (
                    torch.equal(getattr(a, name), getattr(b, name)) and getattr(b, name).dtype == getattr(a, name).dtype
                )
            assert a.lengths == b.lengths == PackedLengths.of(b.segment.numpy())
        assert ahead.consumed_rows == own.consumed_rows and ahead.figures == own.figures
    assert torch.rand(1) == expected
    assert ahead.consumed_rows == 60 and own.waited > 0
    ahead.close()


def test_a_workers_user_error_is_the_same_line(tmp_path):
    def opened():
        dataset = TokenDataset(tmp_path / "source" / "train", CODECS)
        return [dataset, TokenDataset(tmp_path / "texts" / "train", CODECS)]

    caches(tmp_path / "source" / "train", 45, seed=1)
    caches(tmp_path / "texts" / "train", 30, seed=2, image=0)
    sets = opened()
    tar = tmp_path / "source" / "train" / f"text.tokens-{TEXT}" / "000001.tar"
    content = bytearray(tar.read_bytes())
    content[512:] = content[512:].replace(b"NUMPY", b"BUMPY")
    tar.write_bytes(content)
    lines = []
    for workers in (0, 1):
        damaged = loader(sets, 1, 0, workers=workers)
        with pytest.raises(UserError, match=r"damaged tokens of 's00\d\d'.*megamm data tokenize") as error:
            for _ in range(9):
                damaged.step()
        damaged.close()
        lines.append(str(error.value))
    assert lines[0] == lines[1]


def test_a_killed_worker_is_said_to_be(sets):
    one = loader(sets, 1, 0, workers=1, prefetch=1)
    one.step()
    worker = one._batches._workers[0].pid
    tensor = Path(f"/dev/shm/torch_{worker}_1_0")
    tensor.touch()  # killed while it handed over a tensor
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(
        UserError, match=rf"a data worker \(process {worker}\) ended unexpectedly; .*lower data.workers"
    ):
        for _ in range(99):
            one.step()
    assert not tensor.exists()
    one.close()


def test_workers_import_no_megatron(sets):
    """Workers are started for every rank, so each import costs seconds and memory."""
    code = (
        "import sys, megamm.data.pipeline.loader; print(*(m for m in sys.modules if m in ('megatron', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert not done.stdout.strip()


def test_positions_come_from_a_table_that_needs_no_codec():
    table = PositionTable(np.stack([np.arange(40)] * 3))
    again = ForkingPickler.loads(ForkingPickler.dumps(table))
    assert all(np.array_equal(again(n), sequential_positions(n)) for n in (0, 1, 17, 40))


def test_a_stream_that_starts_at_a_block_has_the_same_rows(sets):
    whole = stream(sets)
    start = whole.block_start(whole.first_row(2) + 3)
    assert (start.block, start.row) == (2, whole.first_row(2))
    later = RowStream(sets, whole.mixture, VOCABULARY, ROW, PACKING, start)
    for r in (start.row, start.row + 1, whole.first_row(3)):
        assert np.array_equal(read_row(later, r).input_ids, read_row(whole, r).input_ids)
