"""Downloads what the next steps read from an object store before they need it.

    fetch = FetchAhead(cache, ahead=16)
    for batch in fetch.before(batches, ...): ...      the same batches, whose members are then in the cache

The order is known, so batches are planned `ahead` steps before they are handed on, and threads download their members.
Of a folder that this node needs nearly whole, and which fits the cache, whole pieces of tars are downloaded; of others
only the members, by ranges. How far ahead depends on the cache too: what is not used yet fills at most a quarter of it.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice

import numpy as np

from megamm.data.pipeline.balance import GlobalBatch
from megamm.data.pipeline.row_stream import RowSpec, RowStream
from megamm.data.pipeline.token_dataset import DocumentSpec, TokenDataset
from megamm.shards.cache_space import BLOCK_BYTES
from megamm.shards.remote_folder import RemoteShardFolder
from megamm.shards.shard_cache import RemoteMember, ShardCache, Wanted, wanted_of

_STREAMS = 8
"""Downloads at a time: one connection rarely uses the full bandwidth of an object store."""
_NEARLY_WHOLE = 0.95
"""Share of a folder's samples from which on it is downloaded whole."""
_SHARE_AHEAD = 0.25
"""Share of the cache that the ranks of a node fill with members that are not used yet."""
_SHARE_WHOLE = 0.8
"""Share of the cache that folders downloaded whole may fill."""


def _members(rows: Sequence[RowSpec]) -> list[RemoteMember]:
    """The members in an object store that these rows are made of."""
    documents = (d for row in rows for d in row.documents if isinstance(d, DocumentSpec))
    spans = (span for document in documents for span in document.spans)
    return [span.member for span in spans if isinstance(span.member, RemoteMember)]


class FetchAhead:
    """Downloads for one rank. `waited`: seconds for which training waited for them."""

    def __init__(self, cache: ShardCache, ahead: int) -> None:
        self.cache, self.ahead, self.waited = cache, ahead, 0.0
        ranks, self._nodes = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
        self._most_bytes = int(cache.options.limit * _SHARE_AHEAD) // ranks
        self._whole: dict[str, RemoteShardFolder] = {}
        """The folders that are downloaded whole, by URL."""
        self._pool = ThreadPoolExecutor(_STREAMS, thread_name_prefix="fetch")

    def _choose_whole(self, stream: RowStream, first_row: int, rows: int) -> None:
        """Choose the folders that this node reads nearly whole in the `rows` rows from `first_row` on."""
        start = stream.block_start(first_row)
        rows_of_block = stream.first_row(start.block + 1) - start.row
        counts = np.bincount(stream.mixture.block(start.block).source, minlength=len(stream.datasets))
        chosen: dict[str, RemoteShardFolder] = {}
        for mixed, dataset, count in zip(stream.mixture.sources, stream.datasets, counts.tolist(), strict=True):
            if not isinstance(dataset, TokenDataset) or mixed.documents < _NEARLY_WHOLE * len(dataset):
                continue
            epochs = count / rows_of_block * rows / mixed.documents
            if dataset.kind != "whole":
                epochs *= min(1.0, 2 / max(1, len(dataset.remote_folders)))  # a document is two parts of a sample
            if share_read(epochs, self._nodes) >= _NEARLY_WHOLE:
                chosen |= {folder.url: folder for folder in dataset.remote_folders}
        fits = sum(folder.tar_bytes for folder in chosen.values()) <= self.cache.options.limit * _SHARE_WHOLE
        self._whole = chosen if fits else {}

    def before(
        self, batches: Iterator[GlobalBatch], stream: RowStream, first_row: int, steps: int, data_rank: int
    ) -> Iterator[GlobalBatch]:
        """The batches of so many steps, each when its members are in the cache. Raises UserError as ShardCache does."""
        planned: deque[tuple[GlobalBatch, list[Future[None]], int]] = deque()
        pending, pieces, batches = 0, set[tuple[str, int, int]](), islice(batches, steps)
        for first in islice(batches, 1):
            self._choose_whole(stream, first_row, steps * len(first.rows))
            batches = chain([first], batches)
        while True:
            while not planned or (len(planned) <= self.ahead and pending < self._most_bytes):
                batch = next(batches, None)
                if batch is None:
                    break
                members = _members([row for micro in batch.microbatches(data_rank) for row in micro])
                size = sum(-(-member.size // BLOCK_BYTES) * BLOCK_BYTES for member in members)
                jobs = [self._pool.submit(self.cache.fetch, wanted) for wanted in self._jobs(members, pieces)]
                planned.append((batch, jobs, size))
                pending += size
            if not planned:
                return
            batch, jobs, size = planned.popleft()
            begin = time.monotonic()
            for job in jobs:
                job.result()
            self.waited += time.monotonic() - begin
            pending -= size
            yield batch

    def _jobs(self, members: Sequence[RemoteMember], done: set[tuple[str, int, int]]) -> Iterator[Wanted]:
        """What to download for these members; done: the pieces of whole folders that were asked for."""
        single = []
        for member in members:
            folder = self._whole.get(member.folder.url)
            if folder is None:
                single.append(member)
                continue
            number, wanted = folder.piece(member)
            if (folder.url, member.shard, number) not in done:
                done.add((folder.url, member.shard, number))
                yield wanted
        yield from wanted_of(single)

    def figures(self) -> Mapping[str, float]:
        """Counters of the node, and the seconds that this rank waited, for the metrics."""
        now = self.cache.figures()
        return {
            "store_bytes": now["downloaded"],
            "store_requests": now["requests"],
            "store_failures": now["failures"],
            "cache_bytes": now["bytes"],
            "cache_evicted_bytes": now["evicted"],
            "store_wait": self.waited,
        }

    def close(self) -> None:
        """Cancel downloads that have not begun, and wait for the others, of at most one piece each."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def share_read(epochs: float, nodes: int) -> float:
    """The share of a source's samples that one of `nodes` nodes reads in so many epochs of a shuffled order."""
    whole, part = divmod(epochs, 1.0)
    return 1.0 - (1.0 - 1.0 / nodes) ** whole * (1.0 - part / nodes)


def fetch_rows(cache: ShardCache, rows: Sequence[RowSpec]) -> None:
    """Download the members of these rows. Raises UserError as ShardCache does."""
    with ThreadPoolExecutor(_STREAMS) as pool:
        for job in [pool.submit(cache.fetch, wanted) for wanted in wanted_of(_members(rows))]:
            job.result()
