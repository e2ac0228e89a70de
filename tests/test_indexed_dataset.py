"""Megatron's .bin/.idx: read as Megatron-core reads them, written byte for byte as its builder; damage is one line.

Megatron-core's own IndexedDataset and IndexedDatasetBuilder are the reference.
"""

import copy
import pickle
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from bin_reference import DType, IndexedDataset, build
from token_members import CODECS, page, write

from megamm.common.errors import UserError
from megamm.data.tokenize.export_bin import export_bin
from megamm.shards.indexed_dataset import DTYPES, BinReader, IndexedTokens, IndexedTokensWriter

DOCUMENTS = [[[5, 6, 7], [8]], [[1, 2]], [], [[9], [], [3, 4, 5, 6]], [[100] * 40], [[0]], []]
"""The sequences of each document: several, none, empty ones, and an empty document at the end."""


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_read_as_by_megatron(tmp_path: Path, code: int) -> None:
    dtype = DType.dtype_from_code(code)
    prefix = build(tmp_path / "x", DOCUMENTS, dtype, multimodal=code == 8)
    theirs, ours, bins = IndexedDataset(str(prefix), multimodal=code == 8), IndexedTokens(prefix), BinReader()
    assert (ours.sequence_modes is not None) == (code == 8)
    assert np.array_equal(ours.sequence_lengths, theirs.sequence_lengths)
    assert np.array_equal(ours.document_indices, theirs.document_indices)
    assert len(ours) == len(DOCUMENTS) and ours.sequences == len(theirs)
    lengths = ours.lengths(0, len(ours)).tolist()
    for number, sequences in enumerate(DOCUMENTS):
        read = [theirs.get(s) for s in range(*theirs.document_indices[number : number + 2])]
        read = [ids[0] for ids in read] if code == 8 else read  # with its mode
        whole = np.concatenate([*read, np.zeros(0, dtype)])
        mine = bins.read(str(ours.bin), ours.dtype.str, int(ours.offsets(number, number)[0]), lengths[number])
        assert mine.dtype == whole.dtype and mine.tolist() == whole.tolist() == list(chain(*sequences))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("documents", [DOCUMENTS, [], [[]]], ids=["many", "none", "empty"])
def test_written_as_by_megatron(tmp_path: Path, dtype: type, documents: list[list[list[int]]]) -> None:
    theirs = build(tmp_path / "theirs", documents, dtype)
    with IndexedTokensWriter(tmp_path / "new" / "ours", np.dtype(dtype).str) as writer:
        for sequences in documents:
            writer.add([np.array(ids, dtype=np.int64) for ids in sequences])
    for extension in ("bin", "idx"):
        ours = (tmp_path / "new" / f"ours.{extension}").read_bytes()
        assert ours == Path(f"{theirs}.{extension}").read_bytes()
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["ours.bin", "ours.idx"]
    assert (writer.documents, writer.tokens) == (len(documents), sum(len(ids) for d in documents for ids in d))
    with pytest.raises(UserError, match=r"the file already exists \(.*ours.bin\); delete it"):
        IndexedTokensWriter(tmp_path / "new" / "ours", "<i4")


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedTokensWriter(tmp_path / "x", "<i4") as writer:
        writer.add([np.array([1, 2])])
        raise KeyError
    assert not list(tmp_path.iterdir())


def _patched(offset: int, form: str, value: int):
    """Return a change of the index: a value at an offset."""

    def change(data: bytes) -> bytes:
        new = struct.pack(form, value)
        return data[:offset] + new + data[offset + len(new) :]

    return change


S, D = sum(map(len, DOCUMENTS)), len(DOCUMENTS) + 1
POINTERS, BOUNDS = 34 + 4 * S, 34 + 12 * S
DAMAGE = {
    "pickle": (lambda data: pickle.dumps({"a": 1}), "this is a pickle, which is never read"),
    "fairseq": (lambda data: b"TNTIDX\x00\x00" + data[8:], r"the older form of fairseq \(TNTIDX\)"),
    "magic": (lambda data: b"MMIDIDY" + data[7:], r"not an index of Megatron-core"),
    "empty": (lambda data: b"", "not an index of Megatron-core"),
    "version": (_patched(9, "<Q", 2), "index of version 2, but only version 1 is read"),
    "dtype": (_patched(17, "<B", 77), "unknown dtype 77"),
    "header": (lambda data: data[:30], "truncated index of 30 bytes"),
    "truncated": (lambda data: data[:-8], "truncated or damaged index: .* bytes expected for 8 sequences"),
    "longer": (lambda data: data + b"\0", "truncated or damaged index"),
    "many": (_patched(18, "<Q", 2**62), "truncated or damaged index"),
    "negative": (_patched(34, "<i", -3), "sequence 0 does not begin where|sequence 1 does not begin where"),
    "length": (_patched(34 + 4, "<i", 2), "sequence 2 does not begin where the one before it ends"),
    "pointer": (_patched(POINTERS + 8 * 3, "<q", 4), "sequence 3 does not begin where the one before it ends"),
    "order": (_patched(BOUNDS + 8, "<q", 4), "document 1 ends before it begins"),
    "cover": (_patched(BOUNDS + 8 * (D - 1), "<q", S + 1), "do not cover its 8 sequences"),
    "modes": (lambda data: data + bytes(4) + b"\1" + bytes(S - 5), "sequence 4 has mode 1, but only text"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_one_line(tmp_path: Path, kind: str) -> None:
    prefix = build(tmp_path / "x", DOCUMENTS, np.int32)
    change, said = DAMAGE[kind]
    idx = tmp_path / "x.idx"
    idx.write_bytes(change(idx.read_bytes()))
    with pytest.raises(UserError, match=said) as error:
        IndexedTokens(prefix)
    assert str(idx) in str(error.value) and "\n" not in str(error.value) and error.value.remedy


def test_a_wrong_bin_is_one_line(tmp_path: Path) -> None:
    prefix = build(tmp_path / "x", DOCUMENTS, np.int32)
    size = (tmp_path / "x.bin").stat().st_size
    for data, found in ((bytes(size - 4), size - 4), (bytes(size + 4), size + 4), (b"", 0)):
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(UserError, match=rf"{size} bytes expected, {found} found \(.*x.bin\)"):
            IndexedTokens(prefix)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError, match=r"no such file, although there is x.idx \(.*x.bin\)"):
        IndexedTokens(prefix)


def test_a_bin_that_is_cut_or_gone_later_is_one_line(tmp_path: Path) -> None:
    prefix = build(tmp_path / "x", DOCUMENTS, np.int32)
    file = tmp_path / "x.bin"
    reader, other = BinReader(), copy.copy(BinReader())
    assert reader.read(str(file), "<i4", 4, 2).tolist() == [6, 7]
    file.write_bytes(file.read_bytes()[:8])
    with pytest.raises(UserError, match=r"truncated after it was opened .*restore it"):
        reader.read(str(file), "<i4", 4, 2)
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="can no longer be read: No such file"):
        other.read(str(prefix) + ".bin", "<i4", 4, 2)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return a source of two texts, a page of three texts, and samples with media, one of them without text."""
    members = [("text", "a", None, [1, 2, 3]), ("text", "b", None, [4]), ("image", "b", None, [1, 2])]
    members += [*page("p", [("text", [5]), ("text", [6, 7]), ("text", [8])]), ("audio", "c", None, [1])]
    members += [*page("q", [("text", [1]), ("image", [2])]), ("text", "d", None, [999])]
    write(tmp_path / "source" / "train", members)
    return tmp_path / "source"


@pytest.mark.parametrize("end_token", [None, 50])
def test_exported_text_equals_megatrons(shards: Path, tmp_path: Path, end_token: int | None) -> None:
    done = export_bin([shards, shards], tmp_path / "out", end_token=end_token, skip_media=True)
    wanted = [[[1, 2, 3]], [[5], [6, 7], [8]], [[999]]] * 2
    if end_token is not None:
        wanted = [[*sequences[:-1], [*sequences[-1], end_token]] for sequences in wanted]
    theirs = build(tmp_path / "theirs", wanted, np.uint16)
    for extension in ("bin", "idx"):
        assert (tmp_path / f"out.{extension}").read_bytes() == Path(f"{theirs}.{extension}").read_bytes()
    read = IndexedDataset(str(tmp_path / "out"))
    assert [read[i].tolist() for i in range(len(read))] == [ids for sequences in wanted for ids in sequences]
    assert (done.documents, done.skipped, done.dtype) == (6, 6, "uint16")
    assert done.tokens == sum(len(ids) for sequences in wanted for ids in sequences)


def test_what_cannot_be_exported_is_one_line(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"3 samples have media, .* \(b, ...\) \(.*train\); give --skip-media"):
        export_bin([shards], out)
    with pytest.raises(UserError, match=r"no text tokens in this split \(.*heldout\)"):
        export_bin([shards], out, "heldout")
    with pytest.raises(UserError, match="no text tokens of codec other"):
        export_bin([shards], out, codec_id="other")
    for token in (-1, 70_000):
        with pytest.raises(UserError, match=f"--end-token {token} is not an id of this token cache"):
            export_bin([shards], out, skip_media=True, end_token=token)
    (shards / "train" / f"text.tokens-{CODECS['text']}").rename(shards / "train" / "text.tokens-u")
    write(tmp_path / "other" / "train", [("text", "a", None, [1])])
    with pytest.raises(UserError, match=r"token caches of different tokenizers: text.tokens-t, text.tokens-u"):
        export_bin([shards, tmp_path / "other"], out, skip_media=True)
    assert not list(tmp_path.glob("*out*"))
