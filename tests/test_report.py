"""The demo's report on a tiny export, and the demo's logic: kept stages, moved paths, promises that can fail."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from codec_data import shape_picture
from demo_tools import load_tool
from media_samples import example, make_codecs
from PIL import Image
from tiny_export import make_export

from megamm.config import load_config
from megamm.data.pipeline.run_data import load_modalities
from megamm.modalities import REGISTRY
from megamm.shards.folder import ShardFolder, ShardWriter

ROOT = Path(__file__).parents[1]
NASTY = 'a <script>alert("x")</script> & "box"'


stages, samples, _ = load_tool("demo_stages"), load_tool("demo_samples"), load_tool("demo_figures")
demo, media, words = load_tool("demo"), load_tool("demo_media"), load_tool("demo_words")
gallery, report = load_tool("demo_gallery"), load_tool("demo_report")
DIRECTIONS = [d for a, b in samples.PAIRS for d in ((a, b), (b, a))]
GAIN = {"mean": 0.1, "standard_error": 0.01, "samples": 9, "nouns": 7, "positive_share": 0.8}
SHARE = {"n": 48, "right": 24, "share": 0.5, "interval": [0.36, 0.64]}
ATTRIBUTES = {"skin": SHARE, "gender": SHARE | {"share": 0.9}}
TEXTS = {"exact": SHARE, "attributes": ATTRIBUTES}
MEDIA = {"retrieval": {"r1": SHARE, "r5": SHARE, "chance_r1": 0.02, "chance_r5": 0.1}}
READ = {"attributes": ATTRIBUTES, "reading": ATTRIBUTES}
FOUND = {f"{a}_to_{b}": TEXTS if b == "text" else MEDIA | (READ if a == "text" else {}) for a, b in DIRECTIONS} | {
    "audio_to_text": {"exact": {"n": 9, "right": 7, "share": 7 / 9, "interval": [0.45, 0.94]}}
}
UNSEEN = {"image_to_text": {"exact": {"n": 24, "right": 1, "share": 1 / 24, "interval": [0.01, 0.2]}}}
SUMMARY = {
    "pair_gain": {f"{a}_to_{b}": GAIN for a, b in DIRECTIONS},
    "pair_gain_by_rule": {"combination": {f"{a}_to_{b}": GAIN for a, b in DIRECTIONS}, "noun": {}},
    "figures": {"combination": FOUND, "noun": UNSEEN},
    "targets": [
        {"target": "audio_to_text: exact", "least": 0.5, "value": SHARE | {"right": 31}, "reached": True},
        {"target": "image_to_text: attributes", "least": 0.85, "value": SHARE | {"attribute": "hat"}, "reached": False},
        {"target": "text_to_image: pair gain above twice its standard error", "value": GAIN, "reached": True},
    ],
    "loss": {m: {"first": 8.0, "last": 4.0} for m in REGISTRY},
    "heldout_loss": dict.fromkeys(REGISTRY, 4.25),
    "codecs": {name: {"psnr_db": 18.5, "codes_used": 0.9} for name in ("text", "visual", "audio", "points")},
    "logits_max_abs_diff": 1e-5,
    "tokens_per_s": 1234.5,
    "padding_share": 0.0125,
    "seconds": {"fetch": 1.0, "generate": 2.0, "total": 3.0},
    "peak_rss_gib": 1.5,
    "resumed_from_step": 10,
    "killed_at_step": 14,
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return (demo output folder, the report's text): two samples of every pair, some captions odd."""
    folder = tmp_path_factory.mktemp("demo")
    make_export(folder)
    for name, codec in make_codecs(folder / "codecs").items():
        if name not in ("text", "visual"):
            codec.rename(folder / "export" / "codecs" / name)
    for name in ("run", "stages"):
        (folder / name).mkdir()
    lines = [{"step": s, "tokens_per_s": 9} | {f"loss/{m}": 8 - s / 5 for m in REGISTRY} for s in range(1, 20)]
    lines.append({"step": 19, "heldout/text": 4.5, "heldout/image": None})
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = {}
    for a, b in samples.PAIRS:
        (folder / "heldout" / f"{a}-{b}").mkdir(parents=True)
        shown[f"{a}-{b}"] = [
            {m: _write(folder, f"heldout/{a}-{b}/{i:03d}.{m}", m, i, NASTY) for m in (a, b)} for i in range(2)
        ]
        for source, target in ((a, b), (b, a)):
            (folder / "generated" / f"{source}_to_{target}").mkdir(parents=True)
            for i in range(2):
                _write(folder, f"generated/{source}_to_{target}/{i:03d}", target, i + 5, ["", "<b>said</b>"][i])
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "stages" / "fetch.json").write_text(json.dumps({"peak_rss_gib": 0.5}))
    mark = {"peak_rss_gib": 1.5, "details": {"combination": shown}}
    (folder / "stages" / "generate.json").write_text(json.dumps(mark))
    (folder / "shards" / "ATTRIBUTION.md").write_text("Drawn by <someone>")
    return folder, report.write_report(folder).read_text()


def _write(folder, stem, modality, number, text):
    data, ending = (text.encode(), "txt") if modality == "text" else example(modality, number)
    (folder / f"{stem}.{ending}").write_bytes(data)
    return f"{stem}.{ending}"


class _Reader(HTMLParser):
    """Collects tags in order, pictures, the shown text, sections by id; fails if tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.pictures, self.shown, self.references = [], [], [], "", []
        self.sections, self.story, self.cards = {}, [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("href", "src", "srcset")]
        if tag == "section":
            self.sections[found["id"]] = ""
        if tag == "img":
            self.pictures.append(found)
        if tag == "p" and ("div", "story") in self.open:
            self.story.append("")
        self.cards += found.get("class") == "example"
        if tag not in ("img", "meta", "br"):
            self.open.append((tag, found.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.shown += data
        if any(tag == "section" for tag, _ in self.open):
            self.sections[list(self.sections)[-1]] += data
        if ("div", "story") in self.open:
            self.story[-1] += data


def test_the_page_is_whole_and_needs_nothing_else(page):
    read = _Reader(page[1])
    within = {f"#{name}" for name in read.sections}
    assert read.references and all(r.startswith("data:") or r in within for r in read.references)
    assert not {"script", "link", "iframe", "someone"} & set(read.tags)
    assert NASTY in read.shown and "<b>said</b>" in read.shown and "(contains no text)" in read.shown
    for figure in ("psnr db18.5", "4.250", "1.2%", "Drawn by <someone>"):
        assert figure in read.shown
    assert not list(page[0].glob(".*partial"))


def test_the_first_screen_has_five_sentences_with_the_figures(page):
    story = _Reader(page[1]).story
    assert story == words.story(SUMMARY) and all(sentence.endswith(".") for sentence in story)
    done, took, learnt, killed, same = story
    assert all(several in done for _, several in words.THINGS.values())
    assert "0.1 minutes" in took and "1,234 tokens per second" in took and "1.5 GiB" in took
    assert "7 of 9 audio clips, 24 of 48 images" in learnt and "2 of 3 targets" in learnt  # the best first
    assert "after step 14" in killed and "step 10" in killed and "repeated 4 steps" in killed
    assert "1.0e-05" in same


def test_every_direction_has_examples_and_figures(page):
    read = _Reader(page[1])
    for a, b in DIRECTIONS:
        shown = read.sections[f"{a}_to_{b}"]
        assert f"{a} to {b}".capitalize() in shown and f"{a} to {b}".capitalize() in read.sections["figures"]
        assert shown.count("Input") == shown.count("→ Output") == shown.count(f"Real {words.THINGS[b][0]}") == 2
        assert shown.count("✓") + shown.count("✗") == 2, "each output is judged"
        figures = "24 of 48 captions are exactly right" if b == "text" else "is among the five nearest (by chance 10"
        assert figures in shown or (a == "audio" and "7 of 9 captions are exactly right" in shown)
    assert "no usable output" in read.sections["image_to_text"]
    figures = read.sections["figures"]
    assert "7 of 9 captions exactly right: 78\u00a0% (45 to 94\u00a0%)" in figures
    assert figures.count("+0.1000 nats per token (standard error 0.0100, 9 samples)") == len(DIRECTIONS)
    targets = read.sections["targets"]
    assert "Not reached: 1 of 3" in targets and "Reached: 2 of 3" in targets
    assert targets.index("least often hat") < targets.index("31 of 48") and "aimed at 85\u00a0%" in targets
    assert "1 of 24 captions exactly right" in read.sections["unseen"]


def test_media_of_every_kind_are_shown_large_enough(page):
    """Each direction's samples as given, made and real; each tokenizer's media before and after."""
    read = _Reader(page[1])
    media_of = {m: 2 * sum((a == m) + 2 * (b == m) for a, b in DIRECTIONS) for m in REGISTRY}
    rebuilt = {m: 4 for m in REGISTRY if m != "text"}
    players = {m: media_of[m] + rebuilt[m] for m in ("audio", "video")}
    assert read.tags.count("audio") == players["audio"] and read.tags.count("video") == players["video"]
    assert read.cards == 2 * len(DIRECTIONS) + 2 * len(rebuilt)
    frames = sum(", frame " in picture["alt"] for picture in read.pictures)
    assert players["video"] < frames <= players["video"] * media.FRAMES
    views = len(media.ANGLES) * (media_of["points"] + rebuilt["points"])
    assert len(read.pictures) == frames + views + sum(media_of[m] + rebuilt[m] for m in ("image", "audio"))
    assert all(int(picture["width"]) >= 96 and picture["alt"] for picture in read.pictures)
    assert read.tags.count("svg") == len(REGISTRY)  # the plots of the losses
    kinds = {reference.partition(";")[0] for reference in read.references if reference[0] != "#"}
    assert kinds == {"data:image/png", "data:audio/flac", "data:video/mp4"}


@pytest.mark.parametrize(
    ("made", "real", "verdict"),
    [
        ("cook, man", "cook, man", ("✓ Right", "letter by letter.")),
        ("cook, man", "cook, woman", ("✗ Wrong", "gender is “man”, should be “woman”. Right: subject.")),
        ("one", "one two", ("✗ Wrong", "word 2 is missing: “two”. Right: word 1.")),
        ("one two", "three", ("✗ Wrong", "is “one”, should be “three”; word 2 “two” was not requested. No part is")),
        ("cook,man", "cook, man", ("✗ Wrong", "should be “cook, man”")),
    ],
)
def test_a_wrong_caption_is_told_apart_from_the_right_one(made, real, verdict):
    sign, text = gallery.of_text(made, real)
    assert sign == verdict[0] and verdict[1] in text


def test_a_picture_is_judged_by_the_real_one_that_is_nearest(page, tmp_path):
    folders = {name: page[0] / "export" / "codecs" / name for name in ("text", "visual")}
    codecs, given = load_modalities(folders, torch.device("cpu")), []
    made = [samples.made_file("combination", "text", "image", i) for i in range(3)]
    (tmp_path / made[0]).parent.mkdir(parents=True)
    for i, (real, generated) in enumerate([(0, 20), (100, 210), (200, 160)]):  # the second is like the third
        given.append({"text": f"{i}.txt", "image": f"{i}.png"})
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
        for file, grey in ((f"{i}.png", real), (made[i], generated)):
            Image.new("RGB", (32, 32), (grey, grey, grey)).save(tmp_path / file)
    shown = gallery.Direction(tmp_path, codecs, "text", "image", given).cards()
    assert shown.count("✓ Recognised") == 2 and "of 3 real images, the right one is the nearest." in shown
    assert shown.count("✗ Wrong") == 1
    assert "nearer to 1 of 3 real images than to the right one; nearest to “number 2”, not to “number 1”." in shown


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_in_a_browser(page, tmp_path, width):
    """Open the page in a frame of this width; a script, which the page itself forbids, measures it."""
    measure = """<script>addEventListener('load', () => parent.postMessage(JSON.stringify({
        width: document.documentElement.clientWidth, whole: document.documentElement.scrollWidth,
        least: Math.min(...[...document.images].map(image => image.getBoundingClientRect().width)),
        lines: Math.min(...[...document.querySelectorAll('.said')].map(text => text.getBoundingClientRect().width))
    }), '*'))</script></body>"""
    text = re.sub("<meta http-equiv[^>]*>", "", page[1], count=1).replace("</body>", measure)
    (tmp_path / "page.html").write_text(text)
    frame = f'<iframe src="page.html" width="{width}" height="800"></iframe>'
    receive = "<script>onmessage = event => { document.body.textContent = event.data }</script>"
    (tmp_path / "frame.html").write_text(f"<body>{frame}{receive}</body>")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1400,900")
    command = ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([*command, str(tmp_path / "frame.html")], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r"\{[^{}]*\}", shown.stdout)[0])
    assert found["whole"] <= found["width"] <= width, "no scrolling to the side"
    assert found["least"] >= 96 and found["lines"] >= 150


def test_the_demos_paths_are_moved_and_nothing_else(tmp_path):
    plain, moved = load_config(demo.CONFIG), load_config(demo.CONFIG, demo.Demo(tmp_path).overrides())
    ours, theirs = moved.model_dump(mode="json"), plain.model_dump(mode="json")
    assert json.loads(json.dumps(theirs).replace("out/demo", str(tmp_path))) == ours
    assert ours["output"] == str(tmp_path / "run")


def test_the_seed_is_that_of_the_run_and_of_the_draws(tmp_path):
    second = demo.Demo(tmp_path, seed=2)
    assert load_config(demo.CONFIG, second.overrides()).train.seed == 2
    commands = samples.write_requests(tmp_path / "export", tmp_path, {}, 2000)
    assert all(command[command.index("--seed") + 1] == "2000" for command in commands)


def test_stages_are_kept_until_their_command_or_an_earlier_one_changes(tmp_path, capsys):
    made = []

    def action(log):
        made.append(log.stem)
        (tmp_path / "second").mkdir()  # fails unless the old one was removed
        return {"answer": len(made)}

    first, second = stages.Stage("a", (), (("--help",),)), stages.Stage("b", ("second",), action=action)
    marks = stages.run_stages(tmp_path, [first, second])
    assert marks["b"]["details"] == {"answer": 1} and marks["a"]["peak_rss_gib"] > 0
    assert "Usage" in (tmp_path / "stages" / "a.log").read_text()
    assert stages.run_stages(tmp_path, [first, second]) == marks and made == ["b"]
    assert capsys.readouterr().out.count("complete, kept") == 2
    changed = stages.Stage("a", (), (("data", "--help"),))
    assert stages.run_stages(tmp_path, [changed, second])["b"]["details"] == {"answer": 2}
    failing = stages.Stage("b", (), (("eval", "nowhere", "nothing"),))
    with pytest.raises(stages.DemoError, match="exited with code 2: error: not an export"):
        stages.run_stages(tmp_path, [changed, failing])
    assert not (tmp_path / "stages" / "b.json").exists()


def _with_gain(**change):
    gains = SUMMARY["pair_gain_by_rule"]["combination"] | {"image_to_text": GAIN | change}
    return {"pair_gain_by_rule": {"combination": gains}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"text": {"first": 8.0, "last": 8.0}}}, "text loss did not fall"),
        ({"loss": {"image": {"first": 8.0, "last": math.nan}}}, "image loss did not fall"),
        (_with_gain(mean=-0.1), "pair gain image_to_text is -0.1000"),
        (_with_gain(mean=0.015), "not above twice its standard error 0.01"),
        (_with_gain(standard_error=None), "pair gain image_to_text"),
        ({"logits_max_abs_diff": 1e-3}, "logits differ"),
        ({"logits_max_abs_diff": math.nan}, "logits differ"),
    ],
)
def test_a_broken_promise_is_named(change, message):
    demo.check(SUMMARY)
    with pytest.raises(stages.DemoError, match=message):
        demo.check(SUMMARY | change)


def test_targets_are_reported_as_reached_or_not():
    lines = {line["target"]: line for line in demo.targets(FOUND, {f"{a}_to_{b}": GAIN for a, b in DIRECTIONS})}
    assert lines["image_to_text: exact"]["reached"] and lines["text_to_image: retrieval r5"]["reached"]
    attributes = lines["image_to_text: attributes"]  # the attribute with the lowest share counts
    assert not attributes["reached"] and attributes["value"]["attribute"] == "skin"
    assert sum("pair gain" in name for name in lines) == len(DIRECTIONS)


def test_an_unseen_word_in_a_combination_is_named(tmp_path):
    shard = tmp_path / "people"
    for split, texts in (("train", ["cook, man", "judge, woman"]), ("heldout", ["cook, woman"])):
        with ShardWriter(shard / split / "text") as writer:
            for i, text in enumerate(texts):
                writer.add(f"{split}{i}", "txt", text.encode())
    (shard / "report.json").write_text(json.dumps({"heldout_by": {"combination": ["heldout0"]}}))
    demo.check_words([shard])
    (tmp_path / "people" / "train" / "text").rename(tmp_path / "old")
    with ShardWriter(shard / "train" / "text") as writer:
        writer.add("train0", "txt", b"cook, man")
    with pytest.raises(stages.DemoError, match="heldout0 of people is held out as a combination, but 'woman'"):
        demo.check_words([shard])


def test_commands_at_once_are_all_run_and_a_failure_is_named(tmp_path):
    stage = stages.Stage("a", (), (("--help",), ("data", "--help"), ("eval", "--help")), at_once=True)
    stages.run_stages(tmp_path, [stage])
    log = (tmp_path / "stages" / "a.log").read_text()
    assert all(f"megamm {name}[OPTIONS]" in log.replace("python -m ", "") for name in ("", "data ", "eval "))
    failing = stages.Stage("a", (), (("--help",), ("train", "nowhere")), at_once=True)
    with pytest.raises(stages.DemoError, match="exited with code 2: error: no such config file"):
        stages.run_stages(tmp_path, [failing])


def test_samples_asked_for_have_different_captions(tmp_path):
    source = make_export(tmp_path, heldout=30).parent / "shards" / "shapes"
    texts = ShardFolder(source / "heldout" / "text")
    rules = {"combination": list(texts.keys[:20]), "noun": list(texts.keys[20:])}
    (source / "report.json").write_text(json.dumps({"heldout_by": rules}))
    chosen = samples.choose([source], "combination", "text", "image", 100)
    captions = [text.data.decode() for text, _ in chosen]
    assert len(set(captions)) == len(captions) == len({texts.read(i) for i in range(20)})
    images = {shape_picture(n)[1]: example("image", n)[0] for n in range(10_000, 10_030)}
    assert set(captions) <= set(images) and all(picture.extension == "png" for _, picture in chosen)
    named = samples.write_heldout([source], tmp_path / "out")
    for names, (text, picture) in zip(named["combination"]["text-image"], chosen, strict=True):
        assert (tmp_path / "out" / names["text"]).read_bytes() == text.data
        assert (tmp_path / "out" / names["image"]).read_bytes() == picture.data
    assert named["noun"]["text-image"] and not named["noun"]["text-audio"]
    commands = samples.write_requests(tmp_path / "export", tmp_path / "out", named, 1)
    lines = [json.loads(line) for command in commands for line in Path(command[3]).read_text().splitlines()]
    pairs = [(rule, "text-image") for rule in named]
    asked = sum(min(len(named[r][p]), samples.asked(r, t)) for r, p in pairs for t in ("text", "image"))
    assert len(lines) == len({line["out"] for line in lines}) == asked
