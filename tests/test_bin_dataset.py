"""Megatron's .bin/.idx as a source of a mixture: documents, held-out share, end-of-text token, rows, resume, errors."""

import json
import math
import shutil
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import warm
import yaml
from bin_files import END, END_ID, text_modality, write_bin
from faults import environment as with_faults
from read_rows import read_row
from run_folders import TRAIN, read_tensors, step_folder
from tiny_run import environment, make_data, megamm, numbers, write_config
from token_members import write

from megamm.common.errors import UserError
from megamm.config import SourceConfig, load_config
from megamm.data.pipeline.bin_dataset import BinDataset, ChosenDocuments, EndToken, open_split
from megamm.data.pipeline.packing import PackingSpec, pack
from megamm.data.pipeline.run_data import OpenSource, StreamOptions, begin_stream, resume_stream, schedule_to_json
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.evaluation.losses import evaluate
from megamm.inference.export_subject import ExportSubject
from megamm.modalities.protocol import sequential_positions
from megamm.model.vocabulary import Vocabulary
from megamm.shards.indexed_dataset import DTYPES

ROW = 12
"""Ten tokens of text and two marks."""
DOCUMENTS = [[[1, 2, 3]], [list(range(10))], [], [list(range(20, 30)), [30]], [[7]], [list(range(40, 65))], [[END_ID]]]
MODALITIES = {"text": text_modality()}


def _numbered(prefix: Path, count: int) -> Path:
    """Write documents of their number in two ids."""
    return write_bin(prefix, [[[i // 90, i % 90]] for i in range(count)])


def _texts(dataset: BinDataset, i: int, row_length: int = ROW) -> list[list[int]]:
    """Return the ids of each piece of a document, and check lengths and keys."""
    specs = dataset.plan(i, 5, row_length)
    documents = [dataset.read(spec) for spec in specs]
    for spec, document in zip(specs, documents, strict=True):
        ((modality, size),) = document.sizes
        assert (spec.key, spec.length) == (document.key, size + 2) == (str(i), spec.length) and modality == "text"
        assert document.given == 0
    return [document.parts[0].ids.tolist() for document in documents]


def _rule(rule: Any) -> EndToken:
    return EndToken(rule, END_ID, END)


def test_documents_are_whole_or_cut_to_rows(tmp_path: Path) -> None:
    dataset = BinDataset(write_bin(tmp_path / "x", DOCUMENTS), "train", 100)
    assert list(dataset.used(ROW)) == [0, 1, 3, 4, 5, 6] and len(dataset) == 6
    whole = [list(chain(*sequences)) for sequences in DOCUMENTS]
    for i in dataset.used(ROW):
        assert _texts(dataset, i, 100) == [whole[i]]
    assert _texts(dataset, 1) == [whole[1]]
    assert _texts(dataset, 3) == [whole[3][:10], [30]]
    assert [len(ids) for ids in _texts(dataset, 5)] == [10, 10, 5] and list(chain(*_texts(dataset, 5))) == whole[5]
    assert dataset.plan(2, 0, ROW) == []


def test_the_end_token_is_added(tmp_path: Path) -> None:
    dataset = BinDataset(write_bin(tmp_path / "x", DOCUMENTS), "train", 100, end=_rule("add"))
    assert _texts(dataset, 0) == [[1, 2, 3, END_ID]] and dataset.plan(2, 0, ROW) == []
    assert _texts(dataset, 1) == [list(range(10)), [END_ID]]  # a piece of its own
    assert _texts(dataset, 3) == [list(range(20, 30)), [30, END_ID]]
    with pytest.raises(
        UserError, match=rf"document 6 already ends with '<\|endoftext\|>' \(id 99\) \({tmp_path}/x.bin\)"
    ):
        _texts(dataset, 6)


@pytest.mark.parametrize("rule", ["check", "remove"])
def test_the_end_token_is_checked(tmp_path: Path, rule: str) -> None:
    ends = [[[*ids, END_ID]] for ids in ([1, 2, 3], range(10), range(20), [])] + [[[5]], [list(range(12))]]
    dataset = BinDataset(write_bin(tmp_path / "x", ends), "train", 100, end=_rule(rule))
    kept = [END_ID] if rule == "check" else []
    assert _texts(dataset, 0) == [[1, 2, 3, *kept]]
    assert _texts(dataset, 1) == ([list(range(10)), kept] if kept else [list(range(10))])
    assert _texts(dataset, 2) == [list(range(10)), list(range(10, 20))] + ([kept] if kept else [])
    assert list(dataset.used(ROW)) == ([0, 1, 2, 3, 4, 5] if kept else [0, 1, 2, 5])  # one token is all of 3 and 4
    with pytest.raises(UserError, match=r"document 5 ends with id 11, not with '<\|endoftext\|>' \(id 99\).*`add`"):
        _texts(dataset, 5)


@pytest.mark.parametrize("option", ["skip", "error"])
def test_long_documents(tmp_path: Path, option: Any) -> None:
    prefix = write_bin(tmp_path / "x", DOCUMENTS)
    dataset, split = BinDataset(prefix, "train", 100, long_documents=option), BinDataset(prefix, "train", 100)
    said = f"{prefix}/train: of 6 samples, longer than a row of 12 tokens and "
    assert str(split.long_samples(ROW)) == f"{said}split: 2 (3, 5)"
    assert str(dataset.long_samples(ROW)) == f"{said}skipped: 2 (3, 5)"
    assert not dataset.long_samples(27) and list(dataset.used(27)) == list(split.used(27))
    assert dataset.plan(5, 0, ROW) == [] and dataset.plan(5, 0, 27) == split.plan(5, 0, 27)
    if option == "skip":
        assert list(dataset.used(ROW)) == [0, 1, 4, 6]
        return
    with pytest.raises(UserError) as error:
        dataset.used(ROW)
    assert "document 3 needs 13 tokens, but a row has 12 (2 such documents, the longest needs 27)" in str(error.value)


def test_heldout_documents_depend_on_their_numbers_alone(tmp_path: Path) -> None:
    longer, shorter = _numbered(tmp_path / "longer", 3000), _numbered(tmp_path / "shorter", 1800)
    splits = {p: [BinDataset(p, s, 100, 0.1) for s in ("train", "heldout")] for p in (longer, shorter)}
    train, heldout = [list(dataset.used(ROW)) for dataset in splits[longer]]
    assert sorted(train + heldout) == list(range(3000))
    assert abs(len(heldout) - 300) < 4 * (3000 * 0.1 * 0.9) ** 0.5  # four standard deviations
    assert [list(d.used(ROW)) for d in splits[shorter]] == [[i for i in s if i < 1800] for s in (train, heldout)]
    # SplitMix64 of 0, 1, 2 as published: 0xE220A8397B1DCDAF is the first output of the state 0.
    assert 0xE220A8397B1DCDAF / 2**64 > 0.1 and 0 in train
    wider = list(BinDataset(longer, "heldout", 100, 0.3).used(ROW))
    assert set(heldout) < set(wider)  # a larger share keeps what was held out
    assert not len(BinDataset(longer, "heldout", 100)) and len(BinDataset(longer, "train", 100)) == 3000
    assert [_texts(splits[longer][1], i)[0] for i in heldout[:3]] == [[i // 90, i % 90] for i in heldout[:3]]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_chosen_documents_equal_brute_force(share: float) -> None:
    mask = np.random.default_rng(0).random(3000) < share
    mask[512:1024] = False  # a whole group
    chosen = ChosenDocuments(len(mask), lambda start, stop: mask[start:stop])
    wanted = np.flatnonzero(mask).tolist()
    assert (
        list(chosen) == wanted == [chosen[i] for i in range(len(chosen))]
        and len(chosen) == len(wanted)
        and chosen[2:5] == wanted[2:5]
    )
    for outside in (-1, len(wanted)):
        with pytest.raises(IndexError):
            chosen[outside]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, 2, 100], "document 1, token 14: 100 is not one of the 100 ids of the text tokenizer"),
        ([-1], "document 1, token 12: -1 is not one"),
        ([1, 2.5], "document 1, token 13: 2.5 is not one"),
        ([float("nan")], "document 1, token 12: nan is not one"),
    ],
)
def test_values_that_are_not_ids(tmp_path: Path, ids: list[float], said: str) -> None:
    prefix = write_bin(tmp_path / "x", [[[1]], [list(range(12)), [0] * len(ids)]], "<i8")
    values = [1, *range(12), *ids]
    dtype = "<f8" if isinstance(ids[-1], float) else "<i8"
    (tmp_path / "x.bin").write_bytes(np.array(values, dtype).tobytes())
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[17] = next(code for code, name in DTYPES.items() if name == dtype)
    (tmp_path / "x.idx").write_bytes(index)
    dataset = BinDataset(prefix, "train", 100)
    first, second = dataset.plan(1, 0, ROW)
    assert dataset.read(first).parts[0].ids.tolist() == list(range(10))
    with pytest.raises(UserError, match=said) as error:
        dataset.read(second)
    assert f"({tmp_path}/x.bin); set tokenizers.text" in str(error.value)


def _source(path: Path, **keys: Any) -> SourceConfig:
    return SourceConfig(path=path, **keys)


def test_wrong_sources_are_one_line(tmp_path: Path) -> None:
    prefix, shards = write_bin(tmp_path / "x", DOCUMENTS), tmp_path / "shards"
    write(shards / "train", [("text", "a", None, [1])])
    wrong = [
        (_source(tmp_path / "x.bin"), rf"names a .bin or .idx file .*set its path to {prefix}, without .bin"),
        (_source(shards, heldout=0.1), "the key `heldout` of a source is for .bin and .idx files"),
        (_source(shards, end_token={"add": END}), "the key `end_token` of a source is for .bin and .idx files"),
        (_source(prefix, documents="pairs"), "documents: pairs needs samples of several parts"),
        (_source(prefix, end_token={"add": "</s>"}), "the text tokenizer has no token '</s>'"),
        (_source(tmp_path / "nothing"), "no text in this split"),
    ]
    for source, said in wrong:
        with pytest.raises(UserError, match=said):
            open_split(source, "train", MODALITIES, "auto")
    assert isinstance(open_split(_source(shards), "train", MODALITIES, "auto"), TokenDataset)
    prefix.mkdir()
    with pytest.raises(UserError, match=r"can be this shard set or x.bin beside it .*rename"):
        open_split(_source(prefix), "train", MODALITIES, "auto")


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"heldout": 1.0}, "heldout"), ({"end_token": {"append": END}}, "end_token"), ({"end_token": {}}, "end_token")],
)
def test_wrong_keys_are_one_line(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    sources = [{"path": str(tmp_path / "x"), **keys}]
    config = write_config(tmp_path, tmp_path / "run", data={"sources": sources})
    with pytest.raises(UserError, match=rf"data\.sources\.0\.{said}.*run.yaml"):
        load_config(config)


def _options() -> StreamOptions:
    vocabulary = Vocabulary.of({"text": (100, "t")})
    return StreamOptions(3, ROW, vocabulary, {"text": PackingSpec(sequential_positions, False)})


def test_a_mixture_with_shards_resumes_by_one_integer(tmp_path: Path) -> None:
    prefix = _numbered(tmp_path / "bin", 700)
    write(tmp_path / "shards" / "train", [("text", f"s{i}", None, [90, i]) for i in range(50)])
    keys = {"heldout": 0.2, "end_token": {"add": END}}

    def opened(source: SourceConfig) -> Any:
        return open_split(source, "train", MODALITIES, "auto")

    both = [_source(prefix, **keys), _source(tmp_path / "shards")]
    sources = [OpenSource(s.path, w, opened(s)) for s, w in zip(both, (3.0, 1.0), strict=True)]
    stream = begin_stream(sources, _options())
    rows = stream.first_row(1)
    seen = Counter(d.key for r in range(rows) for d in stream.row_spec(r).documents)
    # A block of 4,096: three quarters of them go through the training documents of the file, each as often.
    train = list(sources[0].dataset.used(ROW))
    times = [seen[str(i)] for i in train]
    assert sum(times) == 3072 and set(times) == {3072 // len(train), 3072 // len(train) + 1}
    assert sum(seen.values()) == 4096 and not any(seen[str(i)] for i in set(range(700)) - set(train))

    recorded = json.loads(json.dumps(schedule_to_json(stream, 123, None)))
    resumed, change = resume_stream(sources, _options(), recorded, 123, opened)
    assert change is None
    for r in (123, 500):
        for one, other in zip(vars(read_row(stream, r)).values(), vars(read_row(resumed, r)).values(), strict=True):
            assert np.array_equal(one, other)
    assert (read_row(stream, 123).input_ids == END_ID).sum() == sum(
        d.key.isdigit() for d in stream.row_spec(123).documents
    )
    # Without the files in the config: the block in progress still has them, with the same documents.
    without, change = resume_stream(sources[1:], _options(), recorded, 123, opened)
    assert change is not None and change.row == rows and "bin removed" in change.what
    assert without.row_spec(rows - 1) == stream.row_spec(rows - 1)
    # Other documents under the name are refused: another share, another end, another file.
    for path, other in (
        (prefix, keys | {"heldout": 0.3}),
        (prefix, {"heldout": 0.2}),
        (tmp_path / "new" / "bin", keys),
    ):
        if path != prefix:
            _numbered(path, 701)
        changed = [OpenSource(path, 3.0, opened(_source(path, **other))), sources[1]]
        with pytest.raises(UserError, match="the shards of source 'bin' have changed since the run began"):
            resume_stream(changed, _options(), recorded, 123, opened)


def test_evaluation_takes_the_heldout_documents(tmp_path: Path) -> None:
    """Equal logits give every token the loss ln(size of the vocabulary), so that only the documents are tested."""
    prefix, options = _numbered(tmp_path / "bin", 60), _options()
    source = _source(prefix, heldout=0.3, end_token={"add": END})
    size = options.vocabulary.size
    export: Any = SimpleNamespace(
        step=4,
        device=torch.device("cpu"),
        modalities=MODALITIES,
        vocabulary=options.vocabulary,
        config=SimpleNamespace(
            data=SimpleNamespace(sources=[source], long_documents="error", seq_length=ROW), spans=frozenset()
        ),
        row=lambda document, length: pack([document], options.vocabulary, length, options.packing),
        model=lambda ids, attention_mask: SimpleNamespace(logits=torch.zeros(*ids.shape, size)),
    )
    heldout = open_split(source, "heldout", MODALITIES, "auto")
    found = evaluate(ExportSubject(export), [prefix])
    # Of each document: two ids, the end of text, and the end mark.
    assert (found.samples, found.tokens) == (len(heldout), {"text": 4 * len(heldout)}) and len(heldout) > 5
    assert found.loss["text"] == pytest.approx(math.log(size)) and not found.pair_gain
    assert evaluate(ExportSubject(export), [prefix], limit=3).samples == 3
    export.config.data.sources = []
    with pytest.raises(UserError, match=r"no held-out samples .*only a source of the run with `heldout` above 0"):
        evaluate(ExportSubject(export), [prefix])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return make_data's folder with corpus.bin and .idx: 400 documents of 5 to 150 tokens."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    generator = np.random.default_rng(1)
    documents = [[generator.integers(0, 256, generator.integers(5, 150)).tolist()] for _ in range(400)]
    write_bin(folder / "corpus", documents, "<u2")
    return folder


def _config(made: Path, output: Path) -> Path:
    corpus = {"path": str(made / "corpus"), "heldout": 0.1}
    sources = [corpus, {"path": str(made / "shards" / "drawn")}]
    return write_config(made, output, train=TRAIN, data={"sources": sources, "workers": 1})


@pytest.fixture(scope="module")
def whole(made: Path) -> Path:
    """Return an uninterrupted run on both sources."""
    done = megamm("train", _config(made, made / "whole"), "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert "corpus/train: of 3" in done.stderr and "longer than a row of 64 tokens and split: " in done.stderr
    assert {"heldout/text", "heldout/image"} <= {key for line in numbers(made / "whole") for key in line}
    return made / "whole"


@pytest.mark.everything
def test_training_is_killed_and_resumed_bit_for_bit(made: Path, whole: Path) -> None:
    killed = _config(made, made / "killed")
    command = [sys.executable, "-m", "megamm", "train", str(killed), "resilience.max_restarts=0", "--nproc", "2"]
    env = with_faults("sigkill_once_saved@step:6:1:0", environment())
    died = warm.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert died.returncode == 1 and not step_folder(made / "killed", 6).exists()
    resumed = megamm("train", killed, "--nproc", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(made / "killed") == numbers(whole)
    ours, theirs = (read_tensors(step_folder(run, 8)) for run in (made / "killed", whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.everything
def test_an_export_is_evaluated_on_the_heldout_documents(made: Path, whole: Path) -> None:
    exported = megamm("convert", "export", whole, made / "export")
    assert exported.returncode == 0, exported.stderr
    evaluated = megamm("eval", made / "export", made / "corpus", "--json", made / "figures.json")
    assert evaluated.returncode == 0, evaluated.stderr
    figures = json.loads((made / "figures.json").read_text())
    heldout = BinDataset(made / "corpus", "heldout", 300, 0.1)
    pieces = [d.length - 1 for i in heldout.used(64) for d in heldout.plan(i, 0, 64)]
    assert figures["samples"] == len(heldout) and figures["tokens"]["text"] == sum(pieces)


@pytest.mark.everything
def test_the_command_line(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    refused = megamm("data", "export-bin", tmp_path / "shards" / "drawn", "--out", tmp_path / "text")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--skip-media" in refused.stderr
    config = _config(made, made / "wrong")
    values = yaml.safe_load(config.read_text())
    values["data"]["sources"][0]["path"] = str(tmp_path / "corpus")
    config.write_text(yaml.safe_dump(values))
    for extension in ("bin", "idx"):
        shutil.copy(made / f"corpus.{extension}", tmp_path)
    planned = megamm("train", config, "--dry-run")
    assert planned.returncode == 0 and "corpus/train: of 3" in planned.stdout, planned.stderr
    (tmp_path / "corpus.bin").write_bytes((tmp_path / "corpus.bin").read_bytes()[:-2])
    stopped = megamm("train", config)
    last = stopped.stderr.splitlines()[-1]
    assert stopped.returncode == 2 and "error: truncated or not of this index" in last and "corpus.bin" in last
