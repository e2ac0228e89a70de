"""Samples of any modality to shards: a toy modality, interleaved pages, leaks between splits, near-duplicates."""

import hashlib
import io
import json
import random
import tarfile

import numpy as np
import pytest
from PIL import Image
from shard_checks import read_all

from megamm.common.errors import UnreadableMedia
from megamm.data.build.curation import CurationOptions
from megamm.data.build.heldout import is_heldout
from megamm.data.build.shards import BuildOptions, build
from megamm.data.raw.samples import RawPart, RawSample, write_samples
from megamm.modalities import REGISTRY
from megamm.shards.folder import ShardFolder


class ToyModality:
    """Numbers as text: enough of a modality for a build, which does not load a codec."""

    name = "toy"
    family = "toy"
    extensions = ("num",)

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        if not data.isdigit():
            raise UnreadableMedia("not a number")
        return hashlib.sha256(str(int(data)).encode()).hexdigest()


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(REGISTRY, "toy", ToyModality)


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def source(folder, samples, **files):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    write_samples(folder, samples)
    return folder


def text(content):
    return RawPart("text", content)


def stored(shards, *, split="train"):
    """Return modality -> {member name: data} of one split, in order."""
    found = {}
    for folder in sorted((shards / split).iterdir()):
        members = {}
        for tar in sorted(folder.glob("*.tar")):
            with tarfile.open(tar) as file:
                members |= {info.name: file.extractfile(info).read() for info in file}
        read_all(ShardFolder(folder))
        found[folder.name] = members
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_modality_registered_elsewhere_goes_through_the_build(tmp_path, toy, workers):
    samples = [
        RawSample("both", "a", (text("one"), RawPart("toy", "1.num"))),
        RawSample("alone", "b", (RawPart("toy", "2.num"),)),
        RawSample("words", "c", (text("three"),)),
        RawSample("bad", "d", (text("four"), RawPart("toy", "bad.num"))),
        RawSample("page", "e", (RawPart("toy", "2.num"), text("five"), RawPart("toy", "1.num")), ordered=True),
    ]
    raw = source(tmp_path / "mine", samples, **{"1_num": b"1", "2_num": b"2", "bad_num": b"x"})
    (report,) = build([raw], tmp_path / "shards", BuildOptions(heldout=0, max_broken=0.5), workers)
    found = stored(tmp_path / "shards" / "mine")
    assert found["toy"] == {"both.num": b"1", "alone.num": b"2", "page.0.num": b"2", "page.2.num": b"1"}
    assert found["text"] == {"both.txt": b"one", "words.txt": b"three", "page.1.txt": b"five"}
    assert report.left_out["broken"] == [{"what": "bad.num", "reason": "not a number"}]
    assert (report.samples, report.train, dict(report.parts)) == (5, 4, {"text": 3, "toy": 4})


def test_samples_are_double_only_if_every_part_is(tmp_path, toy):
    """The same medium with another caption is a different sample; the same file re-encoded is a duplicate."""
    samples = [
        RawSample("a", "x", (text("one"), RawPart("toy", "1.num"))),
        RawSample("b", "x", (text("one"), RawPart("toy", "same.num"))),
        RawSample("c", "x", (text("other"), RawPart("toy", "1.num"))),
        RawSample("d", "x", (text("one"),)),
        RawSample("e", "x", (text("one"), RawPart("toy", "1.num")), ordered=True),
        RawSample("f", "x", (RawPart("toy", "1.num"), text("one")), ordered=True),
    ]
    raws = [
        source(tmp_path / "mine", samples, **{"1_num": b"1", "same_num": b"001"}),
        source(tmp_path / "more", samples[:1], **{"1_num": b"1"}),
    ]
    mine, more = build(raws, tmp_path / "shards", BuildOptions(heldout=0))
    kept = {name.split(".")[0] for name in stored(tmp_path / "shards" / "mine")["text"]}
    doubles = mine.left_out["duplicates"]
    assert {double["what"] for double in doubles} | kept == set("abcdef") and len(doubles) == 2
    assert {"c", "d", "f"} <= kept and len(kept & {"a", "b", "e"}) == 1
    (double,) = more.left_out["duplicates"]
    assert double["what"] == "a" and double["reason"].startswith("identical to mine/")


def test_a_medium_is_in_one_split_only(tmp_path, toy):
    """Within a source the held-out sample is dropped, whatever the keys; between sources the later one."""
    nouns = {share: next(n for n in map(str, range(999)) if is_heldout(n, 0.5) == share) for share in (False, True)}
    samples = [
        RawSample(f"{side}-{n}", nouns[side == "out"], (text(f"{side} {n}"), RawPart("toy", f"{n}.num")))
        for side in ("train", "out")
        for n in range(6)
    ]
    files = {f"{n}_num": str(n).encode() for n in range(9)}
    lone = RawSample("lone", nouns[True], (RawPart("toy", "8.num"),))
    raws = [source(tmp_path / "mine", [*samples, lone], **files)]
    raws.append(source(tmp_path / "more", [RawSample("late", nouns[False], (text("late"), *lone.parts))], **files))
    report, later = build(raws, tmp_path / "shards", BuildOptions(heldout=0.5))
    assert sorted(leak["what"] for leak in report.left_out["leaks"]) == [f"out-{n}" for n in range(6)]
    assert {leak["reason"] for leak in report.left_out["leaks"]} == {"its toy is in the train split"}
    assert later.left_out["leaks"] == [{"what": "late", "reason": "its toy is in the heldout split"}]
    assert set(stored(tmp_path / "shards" / "mine", split="heldout")["toy"].values()) == {b"8"}


def test_near_duplicate_documents_go_and_captions_stay(tmp_path):
    rng = random.Random(0)
    words = [f"word{number}" for number in range(400)]
    document = [rng.choice(words) for _ in range(300)]
    changed = [*document[:150], "another", *document[151:]]
    other = [rng.choice(words) for _ in range(300)]
    long = " ".join(document[:60])
    samples = [
        RawSample("a", "a", (text(" ".join(document)),)),
        RawSample("b", "b", (text(" ".join(changed)),)),
        RawSample("c", "c", (text(" ".join(other)),)),
        RawSample("d", "d", (text(" ".join(other)), RawPart("image", "1.png")), ordered=True),
        RawSample("e", "e", (text(long), RawPart("image", "1.png"))),
        RawSample("f", "f", (text(f"{long} x"), RawPart("image", "2.png"))),
        RawSample("g", "g", (text("short text"),)),
        RawSample("h", "h", (text("short text x"),)),
    ]
    for threshold, near in ((0.8, 2), (0.0, 0)):
        options = BuildOptions(heldout=0, curation=CurationOptions(near_duplicates=threshold))
        raw = tmp_path / "mine"
        if not raw.exists():
            source(raw, samples, **{"1_png": picture(1), "2_png": picture(2)})
        (report,) = build([raw], tmp_path / str(threshold), options)
        left_out = report.left_out["near_duplicates"]
        assert len(left_out) == near and report.train == 8 - near
    # Of equal pairs, the one whose key's hash is first is kept.
    assert {"a", "b", "c", "d"} >= {entry["what"] for entry in left_out}


def test_rules_and_masking_are_counted(tmp_path):
    flat = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(flat, format="PNG")
    samples = [
        RawSample("mail", "a", (text("write to me@example.org or 192.168.0.1"), RawPart("image", "1.png"))),
        RawSample("flat", "b", (text("red square"), RawPart("image", "flat.png"))),
        RawSample("short", "c", (text("x"),)),
    ]
    raw = source(tmp_path / "mine", samples, **{"1_png": picture(1), "flat_png": flat.getvalue()})
    options = BuildOptions(heldout=0, curation=CurationOptions(min_characters=3, mask_pii=True))
    (report,) = build([raw], tmp_path / "shards", options)
    assert stored(tmp_path / "shards" / "mine")["text"] == {"mail.txt": b"write to <EMAIL> or <IP>"}
    written = json.loads((tmp_path / "shards" / "report.json").read_text())["mine"]
    assert written["left_out"]["image_sanity"] == [{"what": "flat.png", "reason": "blank: a single colour"}]
    assert written["left_out"]["text_length"][0]["what"] == "short"
    assert written["masked"] == {"EMAIL": 1, "IP": 1} and written["curation"]["min_characters"] == 3
    assert report.summary().endswith("skipped: 1 text length, 1 image sanity; masked: 1 EMAIL, 1 IP")


def test_unknown_fields_are_reported(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "samples.jsonl").write_text('{"text": "x", "imgae": "a"}\n{"text": "y", "width": 3}\n')
    (report,) = build([tmp_path / "mine"], tmp_path / "shards", BuildOptions())
    assert report.ignored_fields == {"imgae": 1, "width": 1}


def test_a_build_without_one_usable_sample_left_is_written(tmp_path):
    """All samples of the second source are in the first one; its folder is still written and reports it."""
    raws = [source(tmp_path / name, [RawSample("k", "a", (text("same"),))]) for name in ("one", "two")]
    build(raws, tmp_path / "shards", BuildOptions())
    report = json.loads((tmp_path / "shards" / "two" / "report.json").read_text())
    assert report["left_out"]["duplicates"] == [{"what": "k", "reason": "identical to one/k"}]
