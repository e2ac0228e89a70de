"""Blocks of tensors to files and back: boxes, items, index; against numpy, torch.save and torch's own reader.

Tensors of random shapes are cut into random boxes over several ranks' files, then read by other random boxes.
"""

import io
import math
import random

import numpy as np
import pytest
import torch
from checkpoint_folders import write_blocks
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as dcp_load

from megamm.checkpoint import index, rank_file, reader
from megamm.checkpoint.rank_file import ALIGNMENT, RankFile
from megamm.checkpoint.tensor_shards import TensorShard, flat_boxes
from megamm.common.errors import UserError

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (1, 4, 1, 6), (2, 1, 3, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


@pytest.mark.parametrize("shape", SHAPES)
def test_flat_ranges_are_cut_into_boxes(shape):
    """For every range of every shape: few boxes, at the stated offsets, hold each element exactly once."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            found = []
            for offset, size, first in flat_boxes(shape, start, stop):
                box = numbers[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].flatten()
                assert box.tolist() == list(range(first, first + math.prod(size)))
                found += [box.tolist()]
            assert sorted(number for box in found for number in box) == list(range(start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1, 64, 33)])
def test_items_are_what_torch_saves(dtype, shape):
    tensor = (torch.rand(shape) * 100).to(dtype)
    saved = io.BytesIO()
    torch.save(tensor, saved)
    frame = rank_file.frame(dtype, shape)
    elements = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    ours = frame.head + elements + frame.tail
    assert len(ours) == len(saved.getvalue())
    assert torch.equal(torch.load(io.BytesIO(ours), weights_only=True), tensor)
    for item in (ours, saved.getvalue()):
        assert torch.equal(rank_file.tensor_in(memoryview(bytearray(item)), dtype, shape), tensor)


def test_items_in_another_form_are_read_by_torch_and_checked(monkeypatch):
    """Strided tensors in the legacy (pre-archive) format; a tensor of another type is rejected."""
    tensor = torch.arange(12.0).reshape(3, 4).T
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        saved = io.BytesIO()
        torch.save(tensor, saved, **options)
        view = memoryview(bytearray(saved.getvalue()))
        assert torch.equal(rank_file.tensor_in(view, torch.float32, (4, 3)), tensor)
        with pytest.raises(ValueError, match="not a tensor"):
            rank_file.tensor_in(view, torch.float32, (5, 3))
        with pytest.raises(ValueError, match="not a tensor"):
            rank_file.tensor_in(view, torch.int32, (4, 3))


def _cut(draw: random.Random, tensor: torch.Tensor, key: str) -> list[TensorShard]:
    """Cut a tensor into random boxes that hold each element once, by halving repeatedly."""
    boxes = [tuple((0, n) for n in tensor.shape)]
    for _ in range(draw.randint(0, 6)):
        box = boxes.pop(draw.randrange(len(boxes)))
        axes = [a for a, (_, n) in enumerate(box) if n > 1]
        if not axes:
            boxes.append(box)
            continue
        axis = draw.choice(axes)
        start, n = box[axis]
        first = draw.randint(1, n - 1)
        for part in ((start, first), (start + first, n - first)):
            boxes.append((*box[:axis], part, *box[axis + 1 :]))
    blocks = []
    for box in boxes:
        data = tensor[tuple(slice(o, o + n) for o, n in box)].contiguous()
        offset, size = tuple(o for o, _ in box), tuple(n for _, n in box)
        blocks.append(TensorShard(key, tuple(tensor.shape), offset, size, data))
    return blocks


def _tensors(draw: random.Random) -> dict[str, torch.Tensor]:
    found = {}
    for number in range(6):
        shape = draw.choice([s for s in SHAPES if s])
        found[f"t.{number}"] = (torch.randn(shape) * 100).to(draw.choice(DTYPES))
    return found | {"scalar": torch.tensor(2.5)}


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_to_any_cut(tmp_path, seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    tensors = _tensors(draw)
    blocks = [block for key, tensor in tensors.items() for block in _cut(draw, tensor, key)]
    draw.shuffle(blocks)
    ranks = draw.randint(1, 4)
    write_blocks(tmp_path / "t", [blocks[rank::ranks] for rank in range(min(ranks, len(blocks)))])
    # torch's own reader.
    theirs = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    dcp_load(theirs, storage_reader=FileSystemReader(tmp_path / "t"), no_dist=True)
    assert all(torch.equal(theirs[key], tensor) for key, tensor in tensors.items())
    # Our reader, with other boxes; what is not requested is not set, and no unneeded file is opened.
    wanted = [block for key, tensor in tensors.items() for block in _cut(draw, torch.zeros_like(tensor), key)]
    wanted = draw.sample(wanted, k=len(wanted) // 2 + 1)
    stored = index.read(tmp_path / "t")
    needed = reader.needed_files(stored, wanted)
    for path in (tmp_path / "t").glob("*.distcp"):
        if path.name not in needed:
            path.unlink()
    reader.load(tmp_path / "t", wanted)
    for block in wanted:
        box = tuple(slice(o, o + n) for o, n in zip(block.offset, block.size, strict=True))
        assert torch.equal(block.data.view(block.size), tensors[block.key][box].reshape(block.size)), block.key


def test_blocks_of_the_same_memory_are_stored_once(tmp_path):
    tensor = torch.randn(50, 20)
    blocks = [TensorShard.whole("a", tensor), TensorShard.whole("b", tensor), TensorShard.whole("c", tensor[:25])]
    write_blocks(tmp_path / "t", [blocks])
    assert 1.5 * tensor.nbytes < (tmp_path / "t" / "__0_0.distcp").stat().st_size < 1.5 * tensor.nbytes + 5000
    starts = {key: stored.shards[0].start for key, stored in index.read(tmp_path / "t").items()}
    assert starts["a"] == starts["b"] != starts["c"] and all(start % ALIGNMENT == 0 for start in starts.values())


def test_blocks_must_make_up_the_whole():
    half = TensorShard("a", (4,), (0,), (2,), torch.zeros(2))
    other = TensorShard("a", (4,), (1,), (2,), torch.zeros(2))
    with pytest.raises(AssertionError, match="stored twice"):
        index.files_of((*RankFile.of([half], "x").entries, *RankFile.of([half], "y").entries))
    with pytest.raises(AssertionError, match="have 2 elements"):
        index.files_of(RankFile.of([half], "x").entries)
    with pytest.raises(AssertionError, match="differ about a"):
        index.files_of(
            (*RankFile.of([half], "x").entries, *RankFile.of([TensorShard.whole("a", torch.zeros(3))], "y").entries)
        )
    assert other.offset == (1,)


def test_what_does_not_fit_is_refused(tmp_path):
    write_blocks(tmp_path / "t", [[TensorShard.whole("a", torch.arange(12.0).reshape(6, 2))]])
    with pytest.raises(UserError, match="no tensor b"):
        reader.load(tmp_path / "t", [TensorShard.whole("b", torch.zeros(1))])
    with pytest.raises(UserError, match=r"a has shape \(6, 2\), but the config needs \(5, 2\)"):
        reader.load(tmp_path / "t", [TensorShard.whole("a", torch.zeros(5, 2))])
    for rows in (4, 8):  # a vocabulary whose padding differs: the rows that both have
        data = torch.full((rows, 2), -1.0)
        reader.load(tmp_path / "t", [TensorShard("a", (rows, 2), (0, 0), (rows, 2), data, grows=True)])
        assert data.flatten().tolist() == [*range(2 * min(rows, 6)), *[-1.0] * (2 * max(0, rows - 6))]
    with pytest.raises(UserError, match="needs"):
        reader.load(tmp_path / "t", [TensorShard("a", (6, 3), (0, 0), (6, 3), torch.zeros(6, 3), grows=True)])


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path):
    block = TensorShard.whole("a", torch.arange(3.0))
    (tmp_path / "secret").write_bytes(b"x" * 4000)
    for name in ("../secret", "/etc/passwd", ".metadata", "x/../../secret"):
        write_blocks(tmp_path / "t", [[block]])
        for contents in index.files_of(RankFile.of([block], name).entries).items():
            (tmp_path / "t" / contents[0]).write_bytes(contents[1])
        with pytest.raises(UserError, match="is not a file in the folder"):
            reader.load(tmp_path / "t", [block])
        for path in (tmp_path / "t").iterdir():
            path.unlink()
        (tmp_path / "t").rmdir()


@pytest.mark.parametrize("cut", [0, 1, 40, 700, 760, 1000])
def test_a_file_that_is_too_short_is_an_error_not_a_crash(tmp_path, cut):
    """Checksums find it first; still, no read may go past the file's pages."""
    write_blocks(tmp_path / "t", [[TensorShard.whole("a", torch.randn(4, 4))]])
    file = tmp_path / "t" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a cannot be read from __0_0\.distcp"):
        reader.load(tmp_path / "t", [TensorShard.whole("a", torch.zeros(4, 4))])
