"""`megamm train` on damaged data: a one-line error and exit code 2 before any process starts; nothing is written."""

import shutil
import sys
from pathlib import Path

import pytest
from tiny_run import make_data, write_config

from megamm import cli


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def _cache(data: Path, modality: str) -> Path:
    return next((data / "shards" / "drawn" / "train").glob(f"{modality}.tokens-*"))


def _truncate_tar(data: Path) -> None:
    tar = _cache(data, "image") / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-3000])


def _swap_indexes(data: Path) -> None:
    shutil.copy(_cache(data, "text") / "index.safetensors", _cache(data, "image") / "index.safetensors")


DAMAGE = {
    "missing shard": (lambda data: (_cache(data, "image") / "000000.tar").unlink(), "000000.tar"),
    "missing index": (lambda data: (_cache(data, "text") / "index.safetensors").unlink(), "index.safetensors"),
    "truncated tar": (_truncate_tar, "000000.tar"),
    "index of another tar": (_swap_indexes, "index and tar do not match"),
    "no token cache": (lambda data: shutil.rmtree(_cache(data, "image")), "megamm data tokenize"),
    "no shards": (lambda data: shutil.rmtree(data / "shards"), "shards/drawn/train"),
    "no tokenizer": (lambda data: shutil.rmtree(data / "tokenizers" / "text"), "tokenizers/text"),
    "damaged codec": (
        lambda data: (data / "tokenizers" / "visual" / "model.safetensors").write_bytes(b"x"),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_data_is_one_line(made, tmp_path, damage, processes, monkeypatch, capsys):
    data = Path(shutil.copytree(made, tmp_path / "data"))
    config = write_config(data, tmp_path / "run")
    spoil, named = DAMAGE[damage]
    spoil(data)
    monkeypatch.setattr(sys, "argv", ["megamm", "train", str(config), "--nproc", str(processes)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert named in printed.err
    assert not (tmp_path / "run").exists()


def test_a_media_document_longer_than_a_row_is_refused(made, tmp_path, monkeypatch, capsys):
    config = write_config(made, tmp_path / "run", data={"seq_length": 16})
    monkeypatch.setattr(sys, "argv", ["megamm", "train", str(config), "--dry-run"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "set data.seq_length to at least" in capsys.readouterr().err
