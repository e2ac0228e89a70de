"""The index of shards in columns: read by the safetensors library, the same rows as from an older one, conversion."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from older_index import INDEX, change_columns, lines_of, read_columns, to_older
from read_rows import read_row
from token_members import CODECS, random_members, write
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UserError
from megamm.data.pipeline.packing import PackingSpec
from megamm.data.pipeline.run_data import OpenSource, StreamOptions, begin_stream
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.modalities.protocol import sequential_positions
from megamm.model.vocabulary import Vocabulary
from megamm.shards import index as shard_index
from megamm.shards import tar_checks
from megamm.shards.columns import map_columns
from megamm.shards.folder import ShardFolder, ShardWriter
from megamm.shards.index import IndexBuilder, map_index
from megamm.shards.indexing import index_tar, write_index

OPTIONS = StreamOptions(
    3,
    128,
    Vocabulary.of({name: (1000, codec) for name, codec in CODECS.items()}),
    {name: PackingSpec(sequential_positions, False) for name in CODECS},
)


@pytest.mark.parametrize("is_aligned", [True, False])
def test_rows_are_those_of_an_older_index(tmp_path: Path, is_aligned: bool) -> None:
    """The order, the tokens and the digest in checkpoints do not depend on the form of the index."""
    shards = write(tmp_path / "new" / "s" / "train", random_members(4, is_aligned=is_aligned), 20)
    older = Path(shutil.copytree(tmp_path / "new", tmp_path / "older")) / "s" / "train"
    for folder in older.iterdir():
        to_older(folder)
    both = [TokenDataset(folder, CODECS, "pairs", "auto") for folder in (shards, older)]
    streams = [begin_stream([OpenSource(Path("s"), 1, dataset)], OPTIONS) for dataset in both]
    for row in range(100):
        new, old = (
            [(d.key, d.length, [s._replace(member=s.member._replace(tar="")) for s in d.spans]) for d in spec.documents]
            for spec in (stream.row_spec(row) for stream in streams)
        )
        assert new == old
    assert np.array_equal(*(read_row(stream, 17).input_ids for stream in streams))
    assert both[0].digest == both[1].digest and both[0].digest.startswith("2:")
    assert both[0].digest_like("") == both[1].digest_like("") != both[0].digest
    assert not list(older.rglob(INDEX)), "an older index is read as it is"


def test_the_library_reads_the_columns(tmp_path: Path) -> None:
    sizes = [3, 70_000, 0, 300]
    with ShardWriter(tmp_path / "x", samples_per_shard=3) as writer:
        for i, size in enumerate(sizes):
            writer.add("k" * (i + 1), f"{i}.npy" if i else "npy", bytes(size), tokens=size)
    columns, metadata = read_columns(tmp_path / "x")
    assert {name: str(column.dtype) for name, column in columns.items()} == {
        **dict.fromkeys(("first", "part", "form", "key"), "uint8"),
        **dict.fromkeys(("size", "tokens", "offset", "tar_bytes", "most_tokens"), "uint32"),
        "checksum": "uint64",
    }
    assert columns["size"].tolist() == columns["tokens"].tolist() == sizes and columns["first"].tolist() == [0, 3, 4]
    assert columns["most_tokens"].tolist() == [70_000] and columns["part"].tolist() == [0, 2, 3, 4]
    assert [key.tobytes() for key in columns["key"]] == [b"k\0\0\0", b"kk\0\0", b"kkk\0", b"kkkk"]
    assert columns["tar_bytes"].tolist() == [(tmp_path / "x" / f"{i:06d}.tar").stat().st_size for i in range(2)]
    assert metadata["total_tokens"] == str(sum(sizes))
    mapped = map_columns(tmp_path / "x" / INDEX).arrays
    assert all(np.array_equal(mapped[name], columns[name]) for name in columns) and mapped.keys() == columns.keys()
    with pytest.raises(ValueError, match="read-only"):
        mapped["size"][0] = 1
    found = [(m["key"], m["ext"], m["offset"], m["size"]) for shard in lines_of(tmp_path / "x") for m in shard]
    tars = sorted((tmp_path / "x").glob("*.tar"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megamm.shards.indexing.tokens_from_bytes", lambda data: np.frombuffer(data, dtype=np.uint8))
        assert found == [(m.key, m.ext, m.offset, m.size) for tar in tars for m in index_tar(tar)]


def test_the_command_converts_older_indexes(tmp_path: Path) -> None:
    """The result is the index that the build writes; a second run reads the tars, with the same result."""
    folder = write(tmp_path / "s", random_members(1, is_aligned=False), 20) / "text.tokens-t"
    built = (folder / INDEX).read_bytes()
    to_older(folder)
    (folder / "notes.jsonl").write_text("mine")
    for source in ("the JSONL indexes", "the tars"):
        result = CliRunner().invoke(app, ["data", "index", str(folder)])
        assert result.exit_code == 0 and result.output.endswith(f" members indexed, from {source}\n"), result.output
        assert (folder / INDEX).read_bytes() == built
        assert {path.name for path in folder.iterdir() if path.suffix != ".tar"} == {INDEX, "notes.jsonl"}


@pytest.mark.parametrize("damage", ["lost", "garbled", "swapped"])
def test_an_older_index_that_is_wrong_is_not_converted(tmp_path: Path, damage: str, caplog) -> None:
    """Every member's header is compared: a wrong offset in the middle of a tar is found, and the tars are read."""
    folder = write(tmp_path / "s", [("text", f"k{i}", None, [i] * 100) for i in range(3)]) / "text.tokens-t"
    built = (folder / INDEX).read_bytes()
    to_older(folder)
    lines = (folder / "000000.jsonl").read_text().splitlines()
    offsets = [line.partition('"offset":')[2].partition(",")[0] for line in lines]
    swapped = [line.replace(offsets[1], "x").replace(offsets[2], offsets[1]).replace("x", offsets[2]) for line in lines]
    text = {"garbled": "{}", "swapped": "\n".join(swapped), "lost": "\n".join(lines[:2])}[damage]
    (folder / "000000.jsonl").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert write_index(folder) == (3, "the tars")
    assert "the JSONL indexes cannot be used" in caplog.text and (folder / INDEX).read_bytes() == built


def test_a_damaged_tar_leaves_the_index_as_it_is(tmp_path: Path) -> None:
    folder = to_older(write(tmp_path / "s", random_members(2, is_aligned=True), 10) / "text.tokens-t")
    tar = folder / "000004.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"000004\.tar"):
        write_index(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_key_with_two_members_is_refused(tmp_path: Path) -> None:
    for keys in (["b", "a", "b"], ["a", "a"]):
        with webdataset.TarWriter(str(tmp_path / "000000.tar")) as tar:
            for i, key in enumerate(keys):
                tar.write({"__key__": key, "txt" if i else "json": b"x" if i else {"a": 1}})
        with pytest.raises(UserError, match="a key has more than one member"):
            write_index(tmp_path)
        assert not (tmp_path / INDEX).exists()


def test_member_names_keep_their_zeros(tmp_path: Path) -> None:
    """Tars of others number parts as they like: 0, 00, 007."""
    names = ["0.txt", "01.json", "002.txt", "3.txt", "10.txt", "txt", "0100.txt"]
    with webdataset.TarWriter(str(tmp_path / "000000.tar")) as tar:
        for i, name in enumerate(names):
            tar.write({"__key__": f"k{i}", name: f"text {i}" if name.endswith("txt") else {"i": i}})
    assert write_index(tmp_path).members == 7
    folder = ShardFolder(tmp_path)
    assert [folder.stored(i).name for i in range(7)] == [f"k{i}.{name}" for i, name in enumerate(names)]
    assert folder.parts.tolist() == [0, 1, 2, 3, 10, -1, 100] and folder.extensions[1:4] == ["json", "txt", "txt"]
    assert folder.read(6) == b"text 6" and folder.keys[-1] == "k6"


def test_a_tar_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Numbers that need 64 bits, in a sparse file."""
    offsets = [512, 5 << 30, 6 << 30]
    source = write(tmp_path / "s", [("text", f"k{i}", None, [i]) for i in range(3)]) / "text.tokens-t"
    tar = (source / "000000.tar").read_bytes()
    (tmp_path / "big").mkdir()
    with (tmp_path / "big" / "000000.tar").open("wb") as file:
        for i, offset in enumerate(offsets):
            file.seek(offset - 512)
            file.write(tar[1024 * i : 1024 * i + 1024])
        file.truncate((6 << 30) + 10240)
    with (tmp_path / "spool").open("w+b") as spool, (tmp_path / "big" / INDEX).open("wb") as file:
        builder = IndexBuilder(spool)
        builder.append(["k0", "k1", "k2"], "npy", np.array([offsets, [130] * 3, [1] * 3]), (6 << 30) + 10240)
        builder.write(file)
    folder = ShardFolder(tmp_path / "big")
    assert [folder.read(i)[-2] for i in range(3)] == [0, 1, 2] and folder.index.offset.dtype == np.uint64


def test_of_many_tars_some_are_checked_at_opening_and_all_when_read(tmp_path: Path, monkeypatch) -> None:
    folder = write(tmp_path / "s", [("text", f"k{i:02d}", None, [i]) for i in range(30)]) / "text.tokens-t"
    monkeypatch.setattr(tar_checks, "TARS_CHECKED", 4)
    (folder / "000005.tar").write_bytes((folder / "000006.tar").read_bytes())
    opened = ShardFolder(folder)
    with pytest.raises(UserError, match=r"index and tar do not match: k15\.npy.*000005\.tar"):
        opened.read(15)
    for checked in (0, 3, 6, 9):
        shutil.copytree(folder, tmp_path / str(checked))
        (tmp_path / str(checked) / f"{checked:06d}.tar").unlink()
        with pytest.raises(UserError, match=f"missing shard {checked:06d}"):
            ShardFolder(tmp_path / str(checked))


def test_the_largest_length_of_every_zone(tmp_path: Path, monkeypatch) -> None:
    """Zones begin at multiples of their size, whatever the tars; each has the largest of its lengths."""
    monkeypatch.setattr(shard_index, "ZONE", 7)
    sizes = np.random.default_rng(0).integers(0, 50, 64).tolist()
    folder = (
        write(tmp_path / "s", [("text", f"k{i:02d}", None, [1] * n) for i, n in enumerate(sizes)], 9) / "text.tokens-t"
    )
    most = map_index(folder).most_tokens
    assert most is not None and most.tolist() == [max(sizes[i : i + 7]) for i in range(0, 64, 7)]


def test_a_stale_index_names_the_command(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", random_members(3, is_aligned=True), 20) / "text.tokens-t"
    change_columns(folder, lambda columns: columns["tar_bytes"].__setitem__(2, 512))
    with pytest.raises(UserError, match=r"the tar has \d+ bytes, 512 when it was indexed.*megamm data index") as error:
        ShardFolder(folder)
    assert "\n" not in str(error.value)
    assert write_index(folder).source == "the tars" and ShardFolder(folder)
