"""Shards: deterministic, readable by unpatched webdataset; every damage is found and named."""

import errno
import io
import tarfile

import numpy as np
import pytest
import webdataset
from older_index import INDEX, change_columns, to_older
from shard_checks import read_all

from megamm.common.errors import UserError
from megamm.shards import folder as shards
from megamm.shards.folder import ShardFolder, ShardWriter, tokens_from_bytes, tokens_to_bytes
from megamm.shards.indexing import index_tar, write_index

TEXTS = {f"sample-{i:03d}": f"text number {i} ".encode() * (i * 7 % 90) for i in range(25)}


def write(folder, per_shard=10):
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for key, data in TEXTS.items():
            writer.add(key, "txt", data)
    return folder


def test_reads_back_what_was_written(tmp_path):
    folder = ShardFolder(write(tmp_path / "text"))
    assert folder.keys == list(TEXTS) and folder.extensions == ["txt"] * 25 and folder.tokens is None
    assert [folder.read(i) for i in reversed(range(25))] == list(reversed(TEXTS.values()))
    read_all(folder)
    assert sorted(p.name for p in (tmp_path / "text").glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]


def test_same_input_same_bytes(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert [p.name for p in sorted(first.iterdir())] == [p.name for p in sorted(second.iterdir())]
    assert all(p.read_bytes() == (second / p.name).read_bytes() for p in first.iterdir())


def test_webdataset_reads_the_tars_unpatched(tmp_path):
    write(tmp_path / "text")
    urls = [str(p) for p in sorted((tmp_path / "text").glob("*.tar"))]
    read = {s["__key__"]: s["txt"] for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert read == TEXTS and list(read) == list(TEXTS)


def test_a_tar_of_webdataset_can_be_indexed_and_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "000000.tar")) as sink:
        for key, data in TEXTS.items():
            sink.write({"__key__": key, "txt": data})
    with pytest.raises(UserError, match="megamm data index"):
        ShardFolder(tmp_path)
    assert write_index(tmp_path) == (25, "the tars")
    folder = ShardFolder(tmp_path)
    read_all(folder)
    assert dict(zip(folder.keys, map(folder.read, range(25)), strict=True)) == TEXTS


def test_rebuilt_index_equals_the_written_one(tmp_path):
    with ShardWriter(tmp_path / "text.tokens-0") as writer:
        for length in (3, 0, 700):
            writer.add(f"k{length}", "npy", tokens_to_bytes(np.arange(length), 4096), tokens=length)
    written = (tmp_path / "text.tokens-0" / INDEX).read_bytes()
    assert ShardFolder(tmp_path / "text.tokens-0").tokens.tolist() == [3, 0, 700]
    write_index(tmp_path / "text.tokens-0")
    assert (tmp_path / "text.tokens-0" / INDEX).read_bytes() == written
    assert [m.tokens for m in index_tar(tmp_path / "text.tokens-0" / "000000.tar")] == [3, 0, 700]


@pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_tokens_keep_their_values_in_the_smallest_type(size, dtype):
    ids = np.array([0, 5, size - 1], dtype=np.int64)
    data = tokens_to_bytes(ids, size)
    assert np.load(io.BytesIO(data)).dtype == dtype
    assert tokens_from_bytes(data).tolist() == ids.tolist() and tokens_from_bytes(data).dtype == np.int64


def test_token_bytes_run_no_pickle_and_must_be_a_row_of_ids():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for data in (file.getvalue(), b"", tokens_to_bytes(np.arange(9), 99)[:-1]):
        with pytest.raises((ValueError, EOFError)):
            tokens_from_bytes(data)
    with pytest.raises(AssertionError):
        tokens_to_bytes(np.array([7]), 7)


def damage_last_shard_lost(folder):
    (folder / "000002.tar").unlink()
    (folder / "000002.jsonl").unlink(missing_ok=True)


def damage_truncated(folder):
    data = (folder / "000001.tar").read_bytes()
    (folder / "000001.tar").write_bytes(data[: len(data) // 2])


def damage_tar_of_another(folder):
    (folder / "000000.tar").write_bytes((folder / "000001.tar").read_bytes())


def damage_tar_longer(folder):
    with (folder / "000001.tar").open("ab") as file:
        file.write(bytes(10240))


def damage_index_of_another(folder):
    (folder / "000000.jsonl").write_text((folder / "000001.jsonl").read_text())


def damage_index_garbled(folder):
    (folder / "000001.jsonl").write_text('{"key": "x"}\n')


def damage_index_cut(folder):
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-9])


def damage_columns_of_another_length(folder):
    change_columns(folder, lambda columns: columns.update(size=columns["size"][:-1]))


TARS = [
    (lambda f: (f / "000001.tar").unlink(), r"missing shard 000001\.tar.*megamm data build"),
    (damage_last_shard_lost, r"missing shard 000002\.tar"),
    (damage_truncated, r"truncated tar .*000001\.tar"),
]


def assert_found(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        ShardFolder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *TARS,
        (damage_tar_of_another, r"index and tar do not match.*000000\.tar"),
        (damage_tar_longer, r"the tar has \d+ bytes, \d+ when it was indexed.*000001\.tar.*megamm data index"),
        (lambda f: (f / "000003.tar").write_bytes(b""), r"the index ends before 000003\.tar.*megamm data index"),
        (lambda f: (f / INDEX).unlink(), r"missing index index\.safetensors.*megamm data index"),
        (damage_index_cut, r"unreadable index.*truncated.*index\.safetensors.*megamm data index"),
        (lambda f: (f / INDEX).write_bytes(b"x" * 99), r"unreadable index.*megamm data index"),
        (lambda f: (f / INDEX).write_bytes(b""), r"unreadable index.*truncated.*megamm data index"),
        (damage_columns_of_another_length, r"unreadable index: its columns have different lengths.*megamm data index"),
        (lambda f: change_columns(f, lambda c: c["first"].sort() or c["first"].fill(3)), "do not add up"),
    ],
)
def test_damage_is_found_at_opening(tmp_path, damage, message):
    assert_found(write(tmp_path / "source" / "train" / "text"), damage, message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *TARS,
        (lambda f: (f / "000001.jsonl").unlink(), r"missing index 000001\.jsonl.*megamm data index"),
        (damage_index_of_another, r"index and tar do not match.*000000\.tar"),
        (damage_index_garbled, r"unreadable index.*000001\.jsonl.*megamm data index"),
        (lambda f: (f / "shards.json").unlink(), r"missing or damaged shards\.json.*megamm data index"),
    ],
)
def test_damage_beside_an_older_index_is_found_at_opening(tmp_path, damage, message):
    assert_found(to_older(write(tmp_path / "source" / "train" / "text")), damage, message)


def swap_two_offsets(columns):
    columns["offset"][[4, 5]] = columns["offset"][[5, 4]]  # everything else is consistent


def test_an_index_that_does_not_match_is_found_when_read(tmp_path):
    folder = write(tmp_path / "text")
    change_columns(folder, swap_two_offsets)
    opened = ShardFolder(folder)
    opened.read(3)
    with pytest.raises(UserError, match=r"index and tar do not match: sample-004\.txt"):
        opened.read(4)
    with pytest.raises(UserError, match="do not match"):
        read_all(opened)
    assert write_index(folder) == (25, "the tars")  # as the error says
    read_all(ShardFolder(folder))


def test_a_truncated_tar_cannot_be_indexed(tmp_path):
    damage_truncated(write(tmp_path / "text"))
    with pytest.raises(UserError, match=r"000001\.tar"):
        write_index(tmp_path / "text")


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError):
        with ShardWriter(tmp_path / "text", samples_per_shard=1) as writer:
            writer.add("a", "txt", b"1")
            writer.add("b", "txt", b"2")
            raise RuntimeError("the run broke")
    assert list(tmp_path.iterdir()) == []


def test_existing_shards_and_unfit_keys_are_refused(tmp_path):
    write(tmp_path / "text")
    with pytest.raises(UserError, match="already exist"):
        ShardWriter(tmp_path / "text")
    for key, message in [("a.b", "unfit"), ("../x", "unfit"), ("", "unfit"), ("twice", "twice")]:
        with pytest.raises(UserError, match=message):
            with ShardWriter(tmp_path / "other") as writer:
                writer.add("twice", "txt", b"")
                writer.add(key, "txt", b"")


def test_no_samples_make_an_empty_readable_shard(tmp_path):
    with ShardWriter(tmp_path / "text"):
        pass
    assert len(ShardFolder(tmp_path / "text")) == 0
    with tarfile.open(tmp_path / "text" / "000000.tar") as file:
        assert file.getnames() == []


def test_a_full_disk_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"disk is full.*free some space"):
        with ShardWriter(tmp_path / "text") as writer:
            writer.add("a", "txt", b"1")
            writer._tar.fileobj.close()
            writer._tar.fileobj = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  every write fails: ENOSPC
            writer.add("b", "txt", b"2")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):  # any other fault is not a user error
        with shards._disk_errors(tmp_path):
            raise OSError(errno.EIO, "bad sector")
