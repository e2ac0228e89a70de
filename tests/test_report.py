"""The demo's report on a tiny export, and the demo's own logic: kept stages, moved paths, promises that can fail."""

import importlib.util
import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from codec_data import as_bytes, shape_picture
from PIL import Image
from tiny_export import make_export, open_tiny

from megamm.config import load_config

ROOT = Path(__file__).parents[1]
NASTY = 'a <script>alert("x")</script> & "box"'
SUMMARY = {
    "pair_gain": {
        d: {"mean": 0.1, "standard_error": 0.01, "samples": 9, "nouns": 7, "positive_share": 0.8}
        for d in ("text_to_image", "image_to_text")
    },
    "loss": {m: {"first": 8.0, "last": 4.0} for m in ("text", "image")},
    "heldout_loss": {"text": 4.5, "image": 4.25},
    "psnr": 18.5,
    "codebook_use": 0.9,
    "logits_max_abs_diff": 1e-5,
    "tokens_per_s": 1234.5,
    "seconds": {"fetch": 1.0, "generate": 2.0, "total": 3.0},
    "peak_rss_gib": 1.5,
    "resumed_from_step": 10,
    "killed_at_step": 14,
}


def _tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo, report = _tool("demo"), _tool("demo_report")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(folder as the demo leaves it, the report's text)."""
    folder = tmp_path_factory.mktemp("demo")
    make_export(folder)
    for name in ("run", "heldout", "generated", "captions", "stages"):
        (folder / name).mkdir()
    lines = [{"step": s, "loss/text": 8 - s / 5, "loss/image": 8 - s / 6, "tokens_per_s": 9} for s in range(1, 20)]
    lines.append({"step": 19, "heldout/text": 4.5, "heldout/image": None})
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(2):
        (folder / "heldout" / f"00{i}.png").write_bytes(as_bytes(shape_picture(i)[0]))
        (folder / "generated" / f"00{i}.png").write_bytes(as_bytes(shape_picture(i + 5)[0]))
        (folder / "captions" / f"00{i}.txt").write_text(["", "<b>said</b>"][i])
    shown = {"captions": [NASTY, "a ball"], "images": ["heldout/000.png", "heldout/001.png"]}
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "stages" / "fetch.json").write_text(json.dumps({"peak_rss_gib": 0.5}))
    (folder / "stages" / "generate.json").write_text(json.dumps({"peak_rss_gib": 1.5, "details": shown}))
    (folder / "shards" / "ATTRIBUTION.md").write_text("Drawn by <nobody>")
    return folder, report.write_report(folder).read_text()


class _Reader(HTMLParser):
    """Tags in order, sources of pictures, the shown text; fails on tags that do not close as they open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.shown, self.references = [], [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("href", "src", "srcset")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.shown += data


def test_the_page_is_whole_and_needs_nothing_else(page):
    read = _Reader(page[1])
    assert read.references and all(r.startswith("data:image/") for r in read.references)
    assert not {"script", "link", "iframe", "nobody"} & set(read.tags)
    assert read.tags.count("img") == 2 + 2 * (2 + 1 + 2)  # plots; generated, captioned and rebuilt pairs
    assert NASTY in read.shown and "<b>said</b>" in read.shown and "(empty)" in read.shown
    for figure in ("+0.1000", "1,234", "18.5 dB", "4.250", "step 10", "kill -9 at step 14"):
        assert figure in read.shown
    assert not list(page[0].glob(".*partial"))


def test_the_psnr_shown_is_that_of_the_codec(page):
    codec = open_tiny(page[0] / "export").modalities["image"]
    original = np.asarray(shape_picture(1)[0])
    again = codec.decode(codec.encode([original])[0]).astype(float)
    by_hand = 10 * math.log10(255**2 / np.mean((original - again) ** 2))
    assert f"{by_hand:.1f} dB" in page[1]
    assert report.psnr(original, original) == math.inf


def test_the_demos_paths_are_moved_and_nothing_else(tmp_path):
    plain, moved = load_config(demo.CONFIG), load_config(demo.CONFIG, demo.Demo(tmp_path).overrides())
    ours, theirs = moved.model_dump(mode="json"), plain.model_dump(mode="json")
    assert json.loads(json.dumps(theirs).replace("out/demo", str(tmp_path))) == ours
    assert ours["output"] == str(tmp_path / "run")


def test_stages_are_kept_until_their_command_or_an_earlier_one_changes(tmp_path, capsys):
    run = demo.Demo(tmp_path)
    made = []

    def action(log):
        made.append(log.stem)
        (tmp_path / "second").mkdir()  # fails unless the old one was removed
        return {"answer": len(made)}

    first, second = demo.Stage("a", (), (("--help",),)), demo.Stage("b", ("second",), action=action)
    marks = demo.run_stages(run, [first, second])
    assert marks["b"]["details"] == {"answer": 1} and marks["a"]["peak_rss_gib"] > 0
    assert "Usage" in (tmp_path / "stages" / "a.log").read_text()
    assert demo.run_stages(run, [first, second]) == marks and made == ["b"]
    assert capsys.readouterr().out.count("complete, kept") == 2
    changed = demo.Stage("a", (), (("data", "--help"),))
    assert demo.run_stages(run, [changed, second])["b"]["details"] == {"answer": 2}
    failing = demo.Stage("b", (), (("eval", "nowhere", "nothing"),))
    with pytest.raises(demo.DemoError, match="ended with 2: error: not an export"):
        demo.run_stages(run, [changed, failing])
    assert not (tmp_path / "stages" / "b.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"text": {"first": 8.0, "last": 8.0}}}, "text loss did not fall"),
        ({"loss": {"image": {"first": 8.0, "last": math.nan}}}, "image loss did not fall"),
        ({"pair_gain": SUMMARY["pair_gain"] | {"image_to_text": {"mean": -0.1}}}, "pair gain image_to_text"),
        ({"logits_max_abs_diff": 1e-3}, "logits differ"),
        ({"logits_max_abs_diff": math.nan}, "logits differ"),
    ],
)
def test_a_broken_promise_is_named(change, message):
    demo.check(SUMMARY)
    with pytest.raises(demo.DemoError, match=message):
        demo.check(SUMMARY | change)


def test_pictures_of_the_report_are_of_different_nouns(tmp_path):
    source = make_export(tmp_path, heldout=30).parent / "shards" / "shapes"
    chosen = demo._choose(source / "heldout")
    assert {caption.split()[-1] for caption, _, _ in chosen} == {"ellipse", "rectangle"} and len(chosen) == 2
    for caption, data, extension in chosen:
        (tmp_path / f"one.{extension}").write_bytes(data)
        number = next(n for n in range(10_000, 10_030) if shape_picture(n)[1] == caption)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), np.asarray(shape_picture(number)[0]))
