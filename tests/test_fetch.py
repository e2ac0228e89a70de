"""`megamm data fetch`: sets of sources, packages, contents of RAW; packages are generated and served on loopback."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UserError
from megamm.data import sources
from megamm.data.raw.samples import RawPart, RawSample, read_samples
from megamm.data.sources import SOURCES, STARTERS, PublicSource, expand, fetch, packages
from megamm.data.sources.media import append_credits
from megamm.data.sources.packages import DebianPrefix, Sdist, fetch_package, find_sdist

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb makes and unpacks the test package")


def debian_package(folder: Path, name: str, files: dict[str, str]) -> Path:
    tree = folder / f"{name}-tree"
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    for path, text in {"DEBIAN/control": control, f"usr/share/doc/{name}/copyright": f"By {name}.", **files}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    deb = folder / f"{name}_1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(deb)], check=True, capture_output=True)
    return deb


def write_words(package: Path, target: Path) -> list[RawSample]:
    append_credits(target, ["Words by Ann."])
    files = sorted((package / "usr/share/words").iterdir())
    return [RawSample(file.name, file.name, (RawPart("text", file.read_text()),)) for file in files]


@pytest.fixture
def words(tmp_path, monkeypatch) -> Iterator[dict[str, Path]]:
    """A source of two packages that are downloaded from a folder."""
    debs = {
        name: debian_package(tmp_path, name, {f"usr/share/words/{name}": f"word {name}"}) for name in ("aaa", "bbb")
    }
    source = PublicSource(("aaa", "bbb"), 1.5, "free", "words", write_words)
    monkeypatch.setattr(sources, "SOURCES", {"words": source, "more": source})
    monkeypatch.setattr(sources, "STARTERS", {"starter": ("words", "more")})
    monkeypatch.setattr(packages, "_download_debian", lambda package, work: Path(shutil.copy(debs[package], work)))
    return debs


@needs_dpkg
def test_a_source_of_two_packages_is_fetched_whole(words, tmp_path):
    raw = tmp_path / "raw"
    assert fetch("words", raw) == (raw / "words", 2)
    assert [sample.parts[0].content for sample in read_samples(raw / "words")] == ["word aaa", "word bbb"]
    credits = (raw / "words/ATTRIBUTION.md").read_text()
    assert all(text in credits for text in ("# words", "Licence: free", "By aaa.", "By bbb.", "Words by Ann."))
    assert [path.name for path in raw.iterdir()] == ["words"]
    assert fetch("words", raw) == (raw / "words", None)


@needs_dpkg
def test_the_command_fetches_a_set_and_says_how_much(words, tmp_path):
    done = CliRunner().invoke(app, ["data", "fetch", "starter", "words", "--to", str(tmp_path / "raw")])
    assert done.exit_code == 0, done.output
    assert "words, more: 3 MB to download" in done.output and "more: 2 samples" in " ".join(done.output.split())
    again = CliRunner().invoke(app, ["data", "fetch", "starter", "--to", str(tmp_path / "raw")])
    assert "0 MB to download" in again.output and "fetched already" in " ".join(again.output.split())


@needs_dpkg
def test_nothing_is_left_of_a_failed_fetch(words, tmp_path):
    words["bbb"].write_bytes(b"no package")
    with pytest.raises(UserError, match=r"cannot unpack bbb_1_all\.deb"):
        fetch("words", tmp_path / "raw")
    assert not list((tmp_path / "raw").iterdir())
    (tmp_path / "raw/words").mkdir()
    with pytest.raises(UserError, match=r"folder exists but has no samples\.jsonl"):
        fetch("words", tmp_path / "raw")


def test_sets_are_within_their_size_and_cover_every_modality():
    sizes = {name: sum(SOURCES[source].download_mb for source in members) for name, members in STARTERS.items()}
    assert sizes["starter"] <= 200 and sizes["starter-small"] <= 120
    assert expand(["starter-small", "emoji", "gcide"]) == [*STARTERS["starter-small"], "gcide"]
    with pytest.raises(UserError, match=r"no source 'imagenet'.*choose from emoji: .*clipart: .*starter: emoji, "):
        expand(["emoji", "imagenet"])


# --- the start of a package ---


@pytest.fixture
def large(tmp_path, monkeypatch) -> Iterator[tuple[Path, list[str]]]:
    """Return (a package whose files do not compress, the ranges requested from its mirror), on loopback."""
    noise = {name: np.random.default_rng(ord(name)).bytes(200_000).hex() for name in "abc"}
    deb = debian_package(tmp_path, "large", {f"usr/share/large/{name}": text for name, text in noise.items()})
    ranges: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append(self.headers["Range"])
            self.send_response(200)  # a server may ignore ranges
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(deb.read_bytes())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    listed = f"Reading lists\n'http://127.0.0.1:{server.server_port}/large_1_all.deb' large_1_all.deb 9 SHA256:0\n"
    monkeypatch.setattr(packages, "_apt_get_download", lambda work, package, *how: listed)
    monkeypatch.setattr(packages, "_download_debian", lambda package, work: Path(shutil.copy(deb, work)))
    yield deb, ranges
    server.shutdown()
    thread.join()
    server.server_close()


def prefix_of(deb: Path, size: int, *files: str) -> DebianPrefix:
    digest = hashlib.sha256(deb.read_bytes()[:size]).hexdigest()
    return DebianPrefix("large", size, digest, tuple(f"usr/share/{file}" for file in files))


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@needs_dpkg
def test_of_a_large_package_the_beginning_will_do(large, tmp_path, caplog):
    deb, ranges = large
    size = deb.stat().st_size // 2
    (tmp_path / "work").mkdir()
    fetch_package(prefix_of(deb, size, "doc/large/copyright", "large/a"), tmp_path / "work", tmp_path / "unpacked")
    assert ranges == [f"bytes=0-{size - 1}"] and not caplog.records
    assert (tmp_path / "work/large.prefix").stat().st_size == size
    assert files_below(tmp_path / "unpacked") == ["usr/share/doc/large/copyright", "usr/share/large/a"]
    assert len((tmp_path / "unpacked/usr/share/large/a").read_text()) == 400_000
    with pytest.raises(UserError, match=r"cannot unpack usr/share/large/c: .*large\.prefix"):
        fetch_package(prefix_of(deb, size, "large/c"), tmp_path / "work", tmp_path / "more")


@needs_dpkg
@pytest.mark.parametrize("why", ["changed", "not by HTTP"])
def test_a_beginning_that_does_not_come_as_expected_is_not_used(large, tmp_path, monkeypatch, caplog, why):
    deb, _ = large
    prefix = prefix_of(deb, deb.stat().st_size // 2, "large/a")
    if why == "changed":
        prefix = dataclasses.replace(prefix, sha256="0" * 64)
    else:
        listed = "'mirror+file:/etc/apt/mirrors.txt/large_1_all.deb' large_1_all.deb 9 SHA256:0"
        monkeypatch.setattr(packages, "_apt_get_download", lambda work, package, *how: listed)
    (tmp_path / "work").mkdir()
    fetch_package(prefix, tmp_path / "work", tmp_path / "unpacked")
    assert f"fetching all: {'unexpected content' if why == 'changed' else 'the mirror does not'}" in caplog.text
    assert files_below(tmp_path / "unpacked") == ["usr/share/large/a"]
    assert not (tmp_path / "work/large.prefix").exists()


# --- source distributions ---


@pytest.fixture
def index(tmp_path, monkeypatch) -> Iterator[Path]:
    """Serve a folder as a simple package index on loopback."""
    folder = tmp_path / "index"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **more):
            super().__init__(*args, directory=str(folder), **more)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def publish(folder: Path, files: dict[str, bytes]) -> str:
    """Put film-1.0.tar.gz into the index; return its SHA-256."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (folder / "files").mkdir(exist_ok=True)
    (folder / "files/film-1.0.tar.gz").write_bytes(buffer.getvalue())
    (folder / "simple/film").mkdir(parents=True, exist_ok=True)
    links = '<a href="../../files/film-0.9.tar.gz">x</a><a href="../../files/film-1.0.tar.gz#sha256=0">film</a>'
    (folder / "simple/film/index.html").write_text(links)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def test_a_source_distribution_is_checked_and_not_run(index, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w')".encode()
    digest = publish(index, {"film-1.0/setup.py": setup, "film-1.0/a/film.zip": b"zip", "film-1.0/b.txt": b"text"})
    unpacked, work = tmp_path / "unpacked", tmp_path / "work"
    work.mkdir()
    fetch_package(Sdist("film", "1.0", digest, (".zip",)), work, unpacked)
    assert [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()] == [
        "film-1.0/a/film.zip"
    ]
    assert not ran.exists()
    monkeypatch.setattr(packages, "_package_index", lambda: os.environ["PIP_INDEX_URL"])  # calling pip takes a second
    with pytest.raises(UserError, match=r"unexpected content of film-1\.0\.tar\.gz"):
        fetch_package(Sdist("film", "1.0", "0" * 64, (".zip",)), work, unpacked)
    with pytest.raises(UserError, match=r"has no film-2\.0\.tar\.gz"):
        fetch_package(Sdist("film", "2.0", digest, (".zip",)), work, unpacked)
    with pytest.raises(UserError, match=r"could not fetch other-1\.0\.tar\.gz: .*404"):
        fetch_package(Sdist("other", "1.0", digest, (".zip",)), work, unpacked)


def test_a_source_distribution_unpacks_nowhere_else(index, tmp_path):
    digest = publish(index, {"film-1.0/../../../escaped.zip": b"zip"})
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError, match=r"cannot unpack film-1\.0\.tar\.gz.*outside"):
        fetch_package(Sdist("film", "1.0", digest, (".zip",)), tmp_path / "work", tmp_path / "work/unpacked")
    assert not list(tmp_path.rglob("escaped.zip"))


def test_both_forms_of_an_index_page_are_read():
    page = json.dumps({"files": [{"url": "/x/film-0.9.tar.gz"}, {"url": "https://files.example/film-1.0.tar.gz"}]})
    assert (
        find_sdist(page, "film-1.0.tar.gz", "http://127.0.0.1/simple/film/") == "https://files.example/film-1.0.tar.gz"
    )
    page = '<a href="../../x/film-1.0.tar.gz#sha256=1">film</a>'
    assert find_sdist(page, "film-1.0.tar.gz", "http://127.0.0.1/simple/film/") == "http://127.0.0.1/x/film-1.0.tar.gz"
    assert find_sdist(page, "film-2.0.tar.gz", "http://127.0.0.1/simple/film/") is None
