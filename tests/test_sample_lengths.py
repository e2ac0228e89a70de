"""Which samples are used: against brute force over every permutation; zones, and the file that keeps the result."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_members import CODECS, random_members, write

from megamm.data.pipeline import sample_table, split_cache
from megamm.data.pipeline.packing import DOCUMENT_MARKS, MEDIA_MARKS
from megamm.data.pipeline.sample_lengths import UsedSamples
from megamm.data.pipeline.token_dataset import TokenDataset, selection
from megamm.shards import index as shard_index

Parts = list[tuple[str, int | None, int]]
"""Modality, number and tokens of the parts of a sample, in reading order."""


def samples_of(made: list) -> dict[str, Parts]:
    """Return the parts of every sample; samples come in the order of the first modality that has them."""
    order = {name: number for number, name in enumerate(CODECS)}
    by_modality = sorted(made, key=lambda member: order[member[0]])
    samples: dict[str, Parts] = {key: [] for _, key, _, _ in by_modality}
    for name, key, number, ids in by_modality:
        samples[key].append((name, number, len(ids)))
    for parts in samples.values():
        parts.sort(key=lambda part: (part[1] if part[1] is not None else -1, order[part[0]]))
    return samples


def documents(dataset: TokenDataset, parts: Parts) -> list[Parts]:
    """Return all documents of a sample, uncut."""
    if parts[0][1] is not None:
        return [parts]
    indexes = range(dataset.permutations(list(dataset.keys).index(KEY[0])))
    return [[parts[p] for p in selection(len(parts), index, dataset.kind)] for index in indexes]


KEY = [""]
"""The key of the sample in question."""


def length(document: Parts, texts: int | None = None) -> int:
    """Return the tokens of a document; texts: most tokens that are kept of every text."""
    sizes = [(n if texts is None else min(n, texts)) if m == "text" else n + MEDIA_MARKS for m, _, n in document]
    return DOCUMENT_MARKS + sum(sizes)


def needed(dataset: TokenDataset, parts: Parts) -> int:
    """Return the tokens that a row must have for the sample, by the rules of docs/data.md."""
    option, found = dataset.long_documents, documents(dataset, parts)
    media = [n + MEDIA_MARKS for m, _, n in parts if m != "text"]
    if option in ("skip", "error"):
        return max(map(length, found))
    if not media:
        return DOCUMENT_MARKS + 1
    if parts[0][1] is not None:
        return DOCUMENT_MARKS + max(media)
    return max(length(document, 1 if option == "cut" else None) for document in found)


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> dict[bool, Path]:
    """Return a split of aligned and one of joined samples, with zones of 16 samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_index, "ZONE", 16)
        return {
            is_aligned: write(tmp_path_factory.mktemp("splits") / "train", random_members(9, is_aligned=is_aligned), 20)
            for is_aligned in (True, False)
        }


@pytest.mark.parametrize("kind", ["whole", "pairs"])
@pytest.mark.parametrize("option", ["auto", "cut", "skip"])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_every_sample_against_brute_force(splits: Any, kind: Any, option: Any, is_aligned: bool, monkeypatch) -> None:
    monkeypatch.setattr(sample_table, "ZONE", 16)
    dataset = TokenDataset(splits[is_aligned], CODECS, kind, option)
    samples = samples_of(random_members(9, is_aligned=is_aligned))
    assert dataset.keys == list(samples)
    everything = np.arange(len(samples))
    wanted, longest = [], []
    for key, parts in samples.items():
        KEY[0] = key
        wanted.append(needed(dataset, parts))
        longest.append(max(map(length, documents(dataset, parts))))
    assert dataset.needed(everything).tolist() == wanted and dataset.longest(everything).tolist() == longest
    for row in (20, 128, 300, 1000):
        used = [i for i, tokens in enumerate(wanted) if tokens <= row]
        found = dataset.used(row)
        assert list(found) == used and len(found) == len(used) and found[3:9] == used[3:9]
        assert found.unused().tolist() == sorted({*range(len(samples))} - {*used})
        said = dataset.long_samples(row)
        keys = list(samples)
        skipped = [keys[i] for i in everything if longest[i] > row and wanted[i] > row]
        others = [keys[i] for i in everything if longest[i] > row and wanted[i] <= row]
        assert (said.skipped.count, said.skipped.first) == (len(skipped), tuple(skipped[:3]))
        assert said.split.count + said.shortened.count == len(others)
        planned = [bool(dataset.plan(i, 1, row)) for i in everything.tolist()]
        assert planned == [tokens <= row for tokens in wanted]


def test_used_samples_are_all_but_the_unused_ones() -> None:
    rng = np.random.default_rng(1)
    for dtype in (np.uint8, np.int64):
        for size in (0, 1, 5, 290):
            unused = np.sort(rng.choice(300, size, replace=False))
            gaps = unused - np.arange(size)
            if gaps.max(initial=0) > np.iinfo(dtype).max:
                continue
            used = UsedSamples(300, gaps.astype(dtype))
            expected = np.setdiff1d(np.arange(300), unused)
            assert len(used) == len(expected) and used.take(np.arange(len(used))).tolist() == expected.tolist()
            assert used.unused().tolist() == unused.tolist() and used[-1] == expected[-1]
            assert [i for i in range(-2, 302) if i in used] == expected.tolist()
            with pytest.raises(IndexError):
                used[len(used)]


@pytest.fixture
def kept(monkeypatch) -> None:
    """Keep the results for any number of samples."""
    monkeypatch.setattr(split_cache, "KEPT_FROM", 0)


@pytest.mark.parametrize("is_aligned", [True, False])
def test_a_large_split_is_read_through_once(tmp_path: Path, is_aligned: bool, kept, monkeypatch, caplog) -> None:
    split = write(tmp_path / "train", random_members(5, is_aligned=is_aligned), 20)
    first = TokenDataset(split, CODECS)
    wanted = list(first.used(128)), str(first.long_samples(128)), list(first.keys)
    files = {path: path.read_bytes() for path in split.iterdir() if path.is_file()}
    assert len(files) == 2 - is_aligned  # aligned caches need no table of parts
    monkeypatch.setattr(sample_table.AlignedSamples, "totals", None)  # a second pass would fail
    monkeypatch.setattr(sample_table.JoinedSamples, "totals", None)
    monkeypatch.setattr(sample_table, "_joined", None)
    again = TokenDataset(split, CODECS)
    assert (list(again.used(128)), str(again.long_samples(128)), list(again.keys)) == wanted
    monkeypatch.undo()
    monkeypatch.setattr(split_cache, "KEPT_FROM", 0)
    for path, content in files.items():
        path.write_bytes(content[:-3])
    with caplog.at_level(logging.WARNING):
        repaired = TokenDataset(split, CODECS)
        assert (list(repaired.used(128)), str(repaired.long_samples(128)), list(repaired.keys)) == wanted
    assert caplog.text.count("computing it again") == len(files)
    assert {path: path.read_bytes() for path in files} == files


def test_each_setting_and_each_content_has_its_own_file(tmp_path: Path, kept) -> None:
    split = write(tmp_path / "train", random_members(5, is_aligned=True), 20)
    settings = [("whole", "auto", 128), ("whole", "auto", 64), ("whole", "cut", 128), ("pairs", "auto", 128)]
    for kind, option, row in settings:
        TokenDataset(split, CODECS, kind, option).used(row)
    assert len(list(split.glob(".used-*"))) == 4
    for cache in list(split.glob("*.tokens-*")):
        for path in cache.iterdir():
            path.unlink()
        cache.rmdir()
    write(split, random_members(6, is_aligned=True), 20)
    changed = TokenDataset(split, CODECS)
    expected = [i for i, tokens in enumerate(changed.needed(np.arange(60)).tolist()) if tokens <= 64]
    assert list(changed.used(64)) == expected and len(list(split.glob(".used-*"))) == 5


def test_where_nothing_can_be_kept_it_is_computed(tmp_path: Path, kept, caplog) -> None:
    split = write(tmp_path / "train", random_members(5, is_aligned=True), 20)
    wanted = list(TokenDataset(split, CODECS).used(128))
    (file,) = split.glob(".used-*")
    file.unlink()
    file.mkdir()  # in place of a read-only folder, as root can write to any
    (file / "x").touch()
    with caplog.at_level(logging.WARNING):
        assert list(TokenDataset(split, CODECS).used(128)) == wanted
    assert "cannot be written" in caplog.text and [path.name for path in split.glob(".*")] == [file.name]
