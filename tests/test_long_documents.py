"""Samples longer than a row, with each `data.long_documents`: what is split, shortened, skipped, counted and named.

All lengths are added up by hand: a document has 2 marks, a medium 2 more, so that a row of 128 holds 126 tokens of
text, or 115 of text beside 9 of a picture.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from read_rows import read_row
from tiny_run import make_data, megamm, write_config
from token_members import CODECS, page, write

from megamm.checkpoint import TrainState, check_same_data
from megamm.common.errors import UserError
from megamm.config import load_config
from megamm.data.pipeline.packing import PackingSpec
from megamm.data.pipeline.run_data import (
    OpenSource,
    StreamOptions,
    begin_stream,
    load_modalities,
    open_run_data,
    resume_stream,
    schedule_to_json,
)
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.modalities.protocol import sequential_positions
from megamm.model.vocabulary import Vocabulary
from megamm.shards.folder import ShardWriter, tokens_to_bytes

ROW = 128
TEXT, PICTURE = list(range(150)), [1] * 9
MEMBERS = [
    *[("text", "long", None, TEXT)],
    *[("text", "pair", None, TEXT), ("image", "pair", None, PICTURE)],
    *[("text", "wide", None, [1, 2]), ("image", "wide", None, [1] * 200)],
    *[("text", "short", None, [1]), ("image", "short", None, [2] * 9)],
    *page("book", [("text", TEXT[:100]), ("image", PICTURE), ("text", TEXT[:40])]),
    *page("atlas", [("text", [5]), ("image", [1] * 200)]),
]
"""Whole, they need 152, 163, 206, 14, 153 and 205 tokens."""
SPLIT = {"long": [[126], [24]], "book": [[100, 9, 15], [25]]}
SHORT = {"short": [[1, 9]]}
SHORTENED = {"pair": [[115, 9]]}
USED: dict[str, dict[str, list[list[int]]]] = {
    "auto": SPLIT | SHORT,
    "cut": SPLIT | SHORT | SHORTENED,
    "skip": SHORT,
}
"""The tokens of each document's parts, without marks."""


def _stream(sources: list[OpenSource]) -> Any:
    return begin_stream(sources, _options())


def _options() -> StreamOptions:
    vocabulary = Vocabulary.of({name: (1000, codec) for name, codec in CODECS.items()})
    return StreamOptions(3, ROW, vocabulary, {name: PackingSpec(sequential_positions, False) for name in CODECS})


def _opened(folder: Path, option: Any, kind: Any = "whole") -> TokenDataset:
    return TokenDataset(folder, CODECS, kind, option)


@pytest.mark.parametrize("option", USED)
def test_documents_of_every_sample(tmp_path: Path, option: str) -> None:
    dataset = _opened(write(tmp_path / "train", MEMBERS), option)
    whole = {key: [] for key in dataset.keys} | USED[option]
    for i, key in enumerate(dataset.keys):
        for permutation in (0, 1):
            documents = [dataset.read(spec) for spec in dataset.plan(i, permutation, ROW)]
            sizes = [[len(part.ids) for part in document.parts] for document in documents]
            is_reversed = key in ("pair", "short") and permutation == 1
            assert sizes == ([parts[::-1] for parts in whole[key]] if is_reversed else whole[key])
            for document in documents:  # every medium is whole, with its own tokens
                media = [part.ids.tolist() for part in document.parts if part.modality == "image"]
                assert all(ids == ([2] * 9 if key == "short" else PICTURE) for ids in media)
            texts = [p.ids.tolist() for document in documents for p in document.parts if p.modality == "text"]
            if key == "long" and texts:  # nothing is lost
                assert texts == [TEXT[:126], TEXT[126:]]
            if key == "book" and texts:
                assert texts == [TEXT[:100], TEXT[:15], TEXT[15:40]]
            if key == "pair" and texts:  # the end is lost
                assert texts == [TEXT[:115]]
    assert [dataset.keys[i] for i in dataset.used(ROW)] == [key for key in dataset.keys if whole[key]]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("auto", "split: 2 (long, book), skipped: 3 (pair, wide, atlas)"),
        ("cut", "split: 2 (long, book), with shortened text: 1 (pair), skipped: 2 (wide, atlas)"),
        ("skip", "skipped: 5 (long, pair, wide, ...)"),
    ],
)
def test_they_are_counted_and_named(tmp_path: Path, option: str, said: str) -> None:
    dataset = _opened(write(tmp_path / "train", MEMBERS), option)
    found = dataset.long_samples(ROW)
    assert str(found) == f"{tmp_path}/train: of 6 samples, longer than a row of 128 tokens and {said}"
    assert found and not dataset.long_samples(206)
    almost = dataset.long_samples(205)  # `wide` needs 206, and its text can be a token shorter
    assert (almost.shortened if option == "cut" else almost.skipped).first == ("wide",)


def test_an_error_names_the_first_sample_its_length_and_the_remedy(tmp_path: Path) -> None:
    split = write(tmp_path / "train", MEMBERS)
    with pytest.raises(UserError) as error:
        _stream([OpenSource(tmp_path, 1, _opened(split, "error"))])
    said = str(error.value)
    assert "sample 'long' needs 152 tokens, but a row has 128 (5 such samples, the longest needs 206)" in said
    assert str(split) in said and "set data.seq_length to at least 206, or data.long_documents to auto" in said
    assert len(_opened(split, "error").used(206)) == 6


@pytest.mark.parametrize(
    ("members", "option", "remedy"),
    [
        (MEMBERS[1:3], "auto", "at least 163, or data.long_documents to cut"),
        (MEMBERS[:1], "skip", "at least 152, or data.long_documents to auto"),
        (MEMBERS[3:5], "cut", "at least 205"),  # 1 token of the text is left
        (MEMBERS[3:5], "error", "at least 206"),
    ],
)
def test_a_source_of_which_nothing_fits_is_refused(tmp_path: Path, members: Any, option: str, remedy: str) -> None:
    """The remedy is one that helps."""
    source = OpenSource(tmp_path, 1, _opened(write(tmp_path / "train", members), option))
    with pytest.raises(UserError) as error:
        _stream([source])
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize(("kind", "needed"), [("pairs", 2 + 11 + 22), ("answers", 2 + 11 + 22)])
def test_of_a_pair_only_the_text_is_shortened(tmp_path: Path, kind: str, needed: int) -> None:
    """The longest pair without text decides whether a sample is used: the same one in every epoch."""
    members = [("text", "t", None, TEXT), ("image", "t", None, PICTURE), ("audio", "t", None, [3] * 20)]
    dataset = _opened(write(tmp_path / "train", members), "cut", kind)
    assert dataset.needed(np.array([0])).tolist() == [needed] and dataset.longest(np.array([0])).tolist() == [
        2 + 150 + 22
    ]
    assert dataset.plan(0, 0, needed - 1) == []
    for permutation in range(6):
        (spec,) = dataset.plan(0, permutation, 100)
        sizes = dict(dataset.read(spec).sizes)
        assert sizes == {"text": 87, "image": 9} or sizes == {"text": 76, "audio": 20} or "text" not in sizes
        assert spec.length <= 100 and spec.given == (kind == "answers")


def test_skipped_samples_take_no_share_of_the_mixture(tmp_path: Path) -> None:
    """Of two sources with the same weight, one has 4 of 5 samples skipped: each gives half of the documents."""
    mostly = [(kind, f"{key}{i}", None, ids) for i in range(4) for kind, key, _, ids in MEMBERS[1:3]]
    write(tmp_path / "a" / "train", mostly + MEMBERS[5:7])
    write(tmp_path / "b" / "train", [(kind, f"b{i}", None, ids) for i in range(5) for kind, _, _, ids in MEMBERS[5:7]])
    sources = [OpenSource(tmp_path / name, 1, _opened(tmp_path / name / "train", "auto")) for name in "ab"]
    stream = _stream(sources)
    keys = [document.key for row in range(100) for document in stream.row_spec(row).documents]
    assert set(keys) == {"short", *(f"b{i}" for i in range(5))} and len(keys) == 900  # 9 documents of 14 tokens in each
    assert abs(keys.count("short") - 450) < 60
    assert [source.documents for source in stream.mixture.sources] == [1, 5]
    row = read_row(stream, 0)
    assert (row.segment == 8).sum() == 14 and (row.segment == -1).sum() == 2


def test_a_resumed_run_has_the_same_rows(tmp_path: Path) -> None:
    sources = [OpenSource(tmp_path, 1, _opened(write(tmp_path / "train", MEMBERS), "auto"))]
    stream = _stream(sources)
    recorded = json.loads(json.dumps(schedule_to_json(stream, 40, None)))
    resumed, change = resume_stream(sources, _options(), recorded, 40, lambda source: sources[0].dataset)
    assert change is None
    assert all(resumed.row_spec(row) == stream.row_spec(row) for row in range(40, 60))


def _state(data: dict[str, Any]) -> TrainState:
    return TrainState(3, 12, 1, {}, [], {"data": {"seq_length": 64} | data, "train": {"seed": 1}}, {}, mixture={})


@pytest.mark.parametrize(
    ("before", "now", "is_same"),
    [
        (None, "auto", True),  # a checkpoint from before this key: its media fitted, its texts were split
        (None, "error", True),  # which the run then refuses if a sample is longer than a row
        (None, "cut", False),
        ("auto", "skip", False),
        ("cut", "auto", False),
        ("error", "cut", True),
        ("skip", "skip", True),
    ],
)
def test_the_choice_stays_that_of_the_checkpoint(tmp_path: Path, before: str | None, now: str, is_same: bool) -> None:
    state = _state({} if before is None else {"long_documents": before})
    config = {"data": {"seq_length": 64, "long_documents": now}, "train": {"seed": 1}}
    if is_same:
        check_same_data(tmp_path, state, config)
        return
    with pytest.raises(UserError, match=f"data.long_documents = {before or 'auto'}, but the config has {now}"):
        check_same_data(tmp_path, state, config)


@pytest.fixture
def with_long(tmp_path: Path) -> Path:
    """A config with a second source `long`: a text of 154 tokens, alone and beside a picture, and short samples."""
    make_data(tmp_path)
    tokenizers = load_config(write_config(tmp_path, tmp_path / "run")).tokenizers
    codecs = {name: modality.codec_id for name, modality in load_modalities(tokenizers).items()}
    ids = [20 + i % 100 for i in range(154)]
    samples = {
        "alone": {"text": ids},
        "beside": {"text": ids, "image": PICTURE},
        **{f"s{i}": {"text": [30 + i], "image": PICTURE} for i in range(4)},
    }
    for split in ("train", "heldout"):
        for name, codec in codecs.items():
            with ShardWriter(tmp_path / "shards" / "long" / split / f"{name}.tokens-{codec}") as writer:
                for key, parts in samples.items():
                    if name in parts:
                        array = tokens_to_bytes(np.array(parts[name]), 300)
                        writer.add(key, "npy", array, tokens=len(parts[name]))
    paths = [str(tmp_path / "shards" / name) for name in ("drawn", "long")]
    data = {"seq_length": 64, "sources": [{"path": path} for path in paths]}
    return write_config(tmp_path, tmp_path / "run", data=data)


@pytest.mark.parametrize(
    ("option", "longest"),
    [("auto", [62, 62, 30]), ("cut", [62, 62, 51, 51, 30]), ("skip", [])],
)
def test_heldout_rows(with_long: Path, option: str, longest: list[int]) -> None:
    """Texts of `alone` in rows of 64: 62 + 62 + 30; of `beside`, in both orders: 64 - 2 - 11 = 51."""
    data = open_run_data(load_config(with_long, [f"data.long_documents={option}"]))
    texts = []
    for row in data.heldout_rows:
        is_text = (row.input_ids >= data.vocabulary["text"].start) & (row.input_ids < data.vocabulary["text"].stop)
        texts += [int((is_text & (row.segment == segment)).sum()) for segment in range(row.segment.max() + 1)]
    assert sorted((length for length in texts if length > 20), reverse=True) == longest
    assert [found.samples for found in data.long_samples if found] == [6, 6]


def test_error_holds_for_heldout_samples_too(with_long: Path) -> None:
    config = load_config(with_long, ["data.long_documents=error"])
    with pytest.raises(UserError, match=r"sample 'alone' needs 156 tokens, but a row has 64 \(2 such.*at least 167"):
        open_run_data(config)
    trained = config.data.sources[1].path / "train"
    short = config.data.sources[0].path / "train"
    trained.rename(trained.with_name("unused"))
    trained.symlink_to(short)
    with pytest.raises(UserError, match=r"'alone' needs 156 tokens.*") as error:
        open_run_data(config)
    assert error.value.where == config.data.sources[1].path / "heldout"


def test_a_run_reports_them_and_keeps_its_choice(with_long: Path, tmp_path: Path) -> None:
    lines = [
        f"{tmp_path}/shards/long/{split}: of 6 samples, longer than a row of 64 tokens and split: 1 (alone), "
        "skipped: 1 (beside)\n"
        for split in ("train", "heldout")
    ]
    checked = megamm("train", with_long, "--dry-run")
    assert checked.returncode == 0, checked.stderr
    assert all(line in checked.stdout for line in lines)
    run = megamm("train", with_long, "resilience.max_restarts=0", "train.stop_after=2")
    assert run.returncode == 0, run.stderr
    assert all(run.stderr.count(line) == 1 for line in lines)
    again = megamm("train", with_long, "resilience.max_restarts=0", "data.long_documents=cut")
    assert again.returncode == 2
    assert "the checkpoint has data.long_documents = auto, but the config has cut" in again.stderr
    refused = megamm("train", with_long, f"output={tmp_path / 'other'}", "data.long_documents=error")
    assert refused.returncode == 2 and not (tmp_path / "other").exists()
    assert "sample 'alone' needs 156 tokens, but a row has 64" in refused.stderr.splitlines()[-1]
