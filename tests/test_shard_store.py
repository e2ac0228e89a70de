"""Shards in an object store: the same bytes as from disk, whatever fails; what is downloaded, kept and evicted."""

import contextlib
import gc
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shard_store import serve
from token_members import CODECS, random_members, write

from megamm.common.errors import UserError
from megamm.config import SourceConfig
from megamm.data.pipeline.fetch_ahead import FetchAhead, share_read
from megamm.data.pipeline.loader import Loader, Reading
from megamm.data.pipeline.mixture import Mixture, MixtureSource
from megamm.data.pipeline.packing import PackingSpec
from megamm.data.pipeline.row_stream import RowStream
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.modalities.protocol import sequential_positions
from megamm.model.vocabulary import Vocabulary
from megamm.shards import shard_cache
from megamm.shards.cache_space import fixed_bytes
from megamm.shards.folder import ShardFolder, ShardWriter
from megamm.shards.index import INDEX, IndexBuilder
from megamm.shards.remote_folder import RemoteShardFolder
from megamm.shards.shard_cache import CachedReader, CacheOptions, cache_of, wanted_of

MB = 1_000_000
VOCABULARY = Vocabulary.of({name: (1000, codec) for name, codec in CODECS.items()})
PACKING = {name: PackingSpec(sequential_positions, name != "text") for name in CODECS}
ROW = 512


def shards(folder: Path, members: int = 40, size: int = 3000, per_tar: int = 10) -> Path:
    """Write a folder of shards with random members of up to `size` bytes, one of them empty and one of zeros."""
    generator = np.random.default_rng(members)
    with ShardWriter(folder, samples_per_shard=per_tar) as writer:
        for i in range(members):
            data = generator.bytes(int(generator.integers(1, size)))
            writer.add(f"k{i:04d}", "bin", {3: b"", 5: bytes(700)}.get(i, data))
    return folder


def options(tmp_path: Path, *, limit: int = 100 * MB, patience: float = 30) -> CacheOptions:
    return CacheOptions(str(tmp_path / "cache"), limit, patience)


def held_bytes(cache: Path) -> int:
    """Bytes on disk of everything in a cache."""
    return sum(path.lstat().st_blocks * 512 for path in cache.rglob("*") if path.is_file())


def download(folder: RemoteShardFolder, numbers: list[int]) -> None:
    for wanted in wanted_of([folder.stored(i) for i in numbers]):
        cache_of(folder._remote.options).fetch(wanted)


def test_members_are_those_on_disk_and_come_once(tmp_path: Path) -> None:
    local = ShardFolder(shards(tmp_path / "store" / "a"))
    with serve(tmp_path / "store") as store:
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path))
        assert [remote.read(i) for i in range(40)] == [local.read(i) for i in range(40)]
        sizes = int(local.index.size.sum()) + (tmp_path / "store" / "a" / INDEX).stat().st_size
        assert sizes <= store.sent <= 1.05 * sizes
        sent = store.sent
        again = RemoteShardFolder(f"{store.url}/a", options(tmp_path))
        assert [again.read(i) for i in range(40)] == [local.read(i) for i in range(40)]
        assert store.sent - sent < 100, "a second start compares the digest of the index only"


def test_neighbours_come_in_one_request(tmp_path: Path) -> None:
    local = ShardFolder(shards(tmp_path / "store" / "a"))
    with serve(tmp_path / "store") as store:
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path))
        begun = len(store.requests)
        _, wanted = remote.piece(remote.stored(12))
        cache_of(options(tmp_path)).fetch(wanted)
        assert len(store.requests) == begun + 1 and store.requests[-1].name == "a/000001.tar"
        assert [remote.read(i) for i in range(10, 20)] == [local.read(i) for i in range(10, 20)]
        download(remote, [20, 22, 23, 29])
        assert len(store.requests) == begun + 4
        download(remote, list(range(20, 30)))  # 21, and 24 to 28
        assert len(store.requests) == begun + 6


def rows_of(split: Path, steps: int, cache: CacheOptions | None = None, workers: int = 0) -> list[list[list[int]]]:
    """The rows of two data ranks, which share the cache if the split is at a URL, and resume in the middle."""
    store = None if cache is None else cache_of(cache)
    dataset = TokenDataset(split, CODECS, cache=store)
    mixture = Mixture([MixtureSource("s", 1, len(dataset.used(ROW)))], 3)
    ranks: list[list[list[int]]] = []
    for rank, first in ((0, 0), (1, 0), (0, steps // 2)):
        left = steps - first if rank else steps // 2
        fetch = None if store is None else FetchAhead(store, ahead=3)
        loader = Loader(
            RowStream([dataset], mixture, VOCABULARY, ROW, PACKING),
            global_batch=4,
            micro_batch=2,
            data_rank=rank,
            data_size=2,
            cost=sum,
            consumed_rows=4 * first,
            reading=Reading(workers, fetch=fetch, steps=left),
        )
        ranks.append([batch.input_ids.flatten().tolist() for _ in range(left) for batch in loader.step()])
        loader.close()
        if fetch is not None:
            fetch.close()
    return ranks


@pytest.mark.parametrize(("is_aligned", "workers"), [pytest.param(True, 1, marks=pytest.mark.everything), (False, 0)])
def test_the_loader_reads_the_same_rows_and_downloads_them_once(tmp_path: Path, is_aligned: bool, workers: int) -> None:
    split = write(tmp_path / "store" / "mine" / "train", random_members(1, is_aligned=is_aligned), samples_per_shard=20)
    needed = sum(file.stat().st_size for file in split.rglob("*.*"))
    with serve(tmp_path / "store") as store:
        store.fault = lambda request: {5: "cut", 12: 503, 14: "cut"}.get(request.number)
        for steps in (2, 10):  # few samples by ranges, then all of them
            wanted = rows_of(split, steps)
            assert rows_of(Path(f"{store.url}/mine/train"), steps, options(tmp_path), workers) == wanted
            assert store.sent <= needed * (1.05 if steps > 2 else 0.9)
        small = options(tmp_path / "other", limit=150_000)
        assert rows_of(Path(f"{store.url}/mine/train"), 10, small) == wanted
        assert cache_of(small).figures()["evicted"] and held_bytes(tmp_path / "other") <= 150_000


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://user:secret@bucket/x", "must not contain a user, password or query"),
        ("s3://bucket//x", "a part without a name"),
        ("https://host/a/../b", "a part without a name"),
    ],
)
def test_urls_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        SourceConfig(path=url)
    assert "secret" not in str(error.value)


def test_which_share_of_a_source_a_node_reads() -> None:
    assert share_read(0.5, 1) == 0.5 and share_read(1, 1) == share_read(3.2, 1) == 1
    assert share_read(1, 4) == 0.25 and share_read(2, 2) == 0.75 and share_read(2.5, 2) == pytest.approx(0.8125)


@pytest.mark.parametrize(
    "fault", ["damage", *(pytest.param(f, marks=pytest.mark.everything) for f in ("cut", 503, 429))]
)
def test_failed_answers_are_repeated(tmp_path: Path, fault: str | int) -> None:
    local = ShardFolder(shards(tmp_path / "store" / "a", members=6))
    with serve(tmp_path / "store") as store:
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path))
        store.fault = lambda request: fault if request.number % 2 == 0 else None
        before = cache_of(options(tmp_path)).figures()["failures"]
        assert [remote.read(i) for i in range(6)] == [local.read(i) for i in range(6)]
        assert cache_of(options(tmp_path)).figures()["failures"] > before


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (403, r"the store refuses to read it: .*403.*give credentials"),
        (404, r"the store has no such file .*000000\.tar.*upload the shards"),
        (503, r"the store failed for 0\.3 seconds: .*503.*data\.cache\.patience"),
        ("hang", r"the store failed for 0\.3 seconds"),
        ("trickle", r"the store failed for 0\.3 seconds"),
        ("whole", r"the server ignores the range.*supports range requests"),
        ("damage", r"1 members from byte 512 on do not match the index .*000000\.tar"),
    ],
)
def test_a_store_that_stays_broken_is_one_line(tmp_path: Path, fault: str | int, message: str) -> None:
    shards(tmp_path / "store" / "a", members=6)
    with serve(tmp_path / "store") as store:
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path, patience=0.3))
        store.fault = lambda request: fault
        with pytest.raises(UserError, match=message) as error:
            remote.read(0)
        assert "\n" not in str(error.value)


def test_a_damaged_cache_is_downloaded_again(tmp_path: Path) -> None:
    local = ShardFolder(shards(tmp_path / "store" / "a"))
    with serve(tmp_path / "store") as store:
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path))
        download(remote, list(range(40)))
        tar = remote.folder / "000002.tar"
        tar.write_bytes(bytes(tar.stat().st_size // 2))  # truncated, and all zeros
        with (remote.folder / "000001.tar").open("r+b") as file:
            file.seek(local.stored(15).offset)
            file.write(b"x")
        assert [remote.read(i) for i in range(40)] == [local.read(i) for i in range(40)]


def test_damaged_and_older_indexes_are_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path / "store" / "a", members=6)
    index = (folder / INDEX).read_bytes()
    with serve(tmp_path / "store") as store:
        url = f"{store.url}/a"
        for at in (3, 80, len(index) // 2, len(index) - 1):
            (folder / INDEX).write_bytes(index[:at] + bytes([index[at] ^ 4]) + index[at + 1 :])
            with pytest.raises(UserError, match=r"damaged.*megamm data index"):
                RemoteShardFolder(url, options(tmp_path, patience=0.3))
        (folder / INDEX).write_bytes(index[:-5])
        with pytest.raises(UserError, match=r"bytes instead of"):
            RemoteShardFolder(url, options(tmp_path, patience=0.3))
        with (folder / INDEX).open("wb") as file, (tmp_path / "spool").open("w+b") as spool:
            builder = IndexBuilder(spool)
            builder.append(["a"], "bin", np.array([[512], [3], [-1]]), 2048)
            builder.write(file)
        with pytest.raises(UserError, match=r"the index has no checksums.*megamm data index FOLDER"):
            RemoteShardFolder(url, options(tmp_path))
        (folder / INDEX).write_bytes(index)
        assert len(RemoteShardFolder(url, options(tmp_path))) == 6


def test_a_new_index_at_the_url_is_noticed(tmp_path: Path) -> None:
    folder = shards(tmp_path / "store" / "a", members=6)
    with serve(tmp_path / "store") as store:
        assert len(RemoteShardFolder(f"{store.url}/a", options(tmp_path))) == 6
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        local = ShardFolder(shards(folder, members=9))
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path))
        assert [remote.read(i) for i in range(9)] == [local.read(i) for i in range(9)]


def test_the_limit_holds_and_what_was_wanted_last_stays(tmp_path: Path) -> None:
    local = ShardFolder(shards(tmp_path / "store" / "a", members=150, size=20_000, per_tar=50))
    limit = 600_000
    with serve(tmp_path / "store") as store:
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path, limit=limit))
        order = np.random.default_rng(0).permutation(150).tolist()
        for i in order:
            assert remote.read(i) == local.read(i)
            assert held_bytes(tmp_path / "cache") <= limit
        figures = cache_of(options(tmp_path, limit=limit)).figures()
        assert figures["evicted"] > 0 and held_bytes(tmp_path / "cache") <= figures["bytes"] + 20_000
        begun = len(store.requests)
        for i in order[-20:]:
            assert remote.read(i) == local.read(i)
        assert len(store.requests) == begun
        with pytest.raises(UserError, match=r"the cache is too small: .*data\.cache\.gb"):
            RemoteShardFolder(f"{store.url}/a", options(tmp_path, limit=10_000)).read(0)


def test_a_source_that_is_not_in_use_makes_room(tmp_path: Path) -> None:
    for name in "abc":
        shards(tmp_path / "store" / name, members=100, size=20_000)
    limit = 1_100_000
    with serve(tmp_path / "store") as store:
        first = RemoteShardFolder(f"{store.url}/a", options(tmp_path, limit=limit))
        download(first, list(range(100)))
        left = first.folder
        del first
        gc.collect()
        for name in "bc":
            download(RemoteShardFolder(f"{store.url}/{name}", options(tmp_path, limit=limit)), list(range(100)))
        assert not left.exists() and fixed_bytes(tmp_path / "cache") < 200_000


def test_threads_and_processes_share_one_download(tmp_path: Path) -> None:
    local = ShardFolder(shards(tmp_path / "store" / "a"))
    with serve(tmp_path / "store") as store:
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path))
        members = [remote.stored(i) for i in range(40)]
        begun = store.sent
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda i: CachedReader().read(members[i % 40]), range(320)))
        assert read == [local.read(i % 40) for i in range(320)]
        assert store.sent - begun == int(local.index.size.sum())


def test_a_killed_download_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    """The process is killed between the reservation, half of the bytes, and the rest."""
    local = ShardFolder(shards(tmp_path / "store" / "a"))
    with serve(tmp_path / "store") as store:
        remote = RemoteShardFolder(f"{store.url}/a", options(tmp_path))
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                pwrite = os.pwrite
                shard_cache.os = _Killing(pwrite)  # type: ignore[attr-defined]
                file = os.open(remote.folder / "000000.tar", os.O_RDWR | os.O_CREAT)
                wanted = remote.piece(remote.stored(0))[1]
                data = local.folder.joinpath("000000.tar").read_bytes()
                start, stop = int(wanted.offset[0]), int(wanted.offset[-1] + wanted.size[-1])
                shard_cache._lock_range(file, start, stop)
                cache_of(options(tmp_path))._reserve(remote.folder / "000000.tar", start, stop)
                shard_cache.os.pwrite(file, data[start:stop], start)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -9
        assert [remote.read(i) for i in range(40)] == [local.read(i) for i in range(40)]


class _Killing:
    """Module os with a pwrite that writes the first half, and ends the process by SIGKILL."""

    def __init__(self, pwrite) -> None:
        self._pwrite = pwrite

    def __getattr__(self, name: str):
        return getattr(os, name)

    def pwrite(self, file: int, data: bytes, start: int) -> None:
        self._pwrite(file, data[: len(data) // 2], start)
        subprocess.run(["kill", "-9", str(os.getpid())])
