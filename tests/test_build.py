"""Raw samples to shards: images are decoded, broken ones named, each noun in one split; builds are deterministic."""

import base64
import io
import json

import pytest
import webdataset
from PIL import Image
from shard_checks import read_all
from source_packages import dotted_png

from megamm.common.errors import UnreadableMedia, UserError
from megamm.data.build.curation import CurationOptions
from megamm.data.build.heldout import is_heldout
from megamm.data.build.media_check import MediaChecks, SkippedSample, check_sample, render_svg
from megamm.data.build.shards import BuildOptions, build
from megamm.data.raw.samples import RawPart, RawSample, normalise_noun
from megamm.modalities import REGISTRY
from megamm.shards.folder import ShardFolder

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="40" height="20">{}</svg>'
)
RED = (255, 0, 0)


def raw_folder(folder, count=40):
    """Write a user's samples: one image and one caption each."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(dotted_png((i, 7 * i % 256, len(folder.name)), size=(8 + i % 3, 9)))
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"thing{chr(97 + i % 26) * (1 + i // 26)} {i}"}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def add(folder, name, data, caption="another thing"):
    (folder / name).write_bytes(data)
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"image": name, "caption": caption}) + "\n")


def samples(shards):
    """Read all samples of a shard set with webdataset: split -> key -> (caption, image bytes)."""
    found = {}
    for split in ("train", "heldout"):
        parts = {}
        for modality in ("text", "image"):
            urls = [str(p) for p in sorted((shards / split / modality).glob("*.tar"))]
            parts[modality] = {
                s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
            }
        assert list(parts["text"]) == list(parts["image"])
        found[split] = {k: (parts["text"][k]["txt"].decode(), parts["image"][k]["png"]) for k in parts["text"]}
    return found


def test_own_samples_become_shards_that_webdataset_reads(tmp_path):
    raw = raw_folder(tmp_path / "mine")
    (report,) = build([raw], tmp_path / "shards", BuildOptions(heldout=0.2))
    found = samples(tmp_path / "shards" / "mine")
    assert report.train == len(found["train"]) and report.heldout == len(found["heldout"]) > 0
    assert report.train + report.heldout == report.samples == 40
    for captions in found.values():
        for key, (caption, image) in captions.items():
            assert int(key.removeprefix("mine-")) == int(caption.split()[1]) + 1  # line numbers start at 1
            assert image == (raw / f"{caption.split()[1]}.png").read_bytes()
    assert json.loads((tmp_path / "shards" / "report.json").read_text())["mine"]["train"] == report.train
    read_all(ShardFolder(tmp_path / "shards" / "mine" / "train" / "image"))


def test_same_input_same_bytes_with_and_without_workers(tmp_path):
    raw = raw_folder(tmp_path / "mine")
    add(raw, "drawing.svg", SVG.format('<circle r="9" cx="12" cy="10"/>').encode())
    build([raw], tmp_path / "a", BuildOptions())
    build([raw], tmp_path / "b", BuildOptions(), workers=2)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    assert len(files) == 11
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_limit_takes_a_random_subset_that_a_larger_limit_extends(tmp_path):
    raw = raw_folder(tmp_path / "mine")
    for limit in (10, 20):
        build([raw], tmp_path / str(limit), BuildOptions(limit=limit, heldout=0))
    small, large = (list(samples(tmp_path / str(limit) / "mine")["train"]) for limit in (10, 20))
    assert large[:10] == small and len(large) == 20
    assert small != sorted(small)


def test_no_noun_is_on_both_sides_across_sources(tmp_path):
    captions = [
        *("man health worker", "woman health worker: dark skin tone", "health workers"),
        *("red car", "cars", "blue car: 2", "flag of Samoa", "Samoa flag"),
        *(f"{animal} {n}" for animal in ("cat", "dog", "fox", "hen", "cow", "pig") for n in range(4)),
    ]
    raws = [tmp_path / "one", tmp_path / "two"]
    for number, raw in enumerate(raws):
        raw.mkdir()
        (raw / "samples.jsonl").write_text("")
        for i, caption in enumerate(captions):
            add(raw, f"{i}.png", dotted_png((i, number, 9)), caption)
    build(raws, tmp_path / "shards", BuildOptions(heldout=0.4))
    sides = {"train": set(), "heldout": set()}
    for raw in raws:
        for split, found in samples(tmp_path / "shards" / raw.name).items():
            sides[split] |= {normalise_noun(caption) for caption, _ in found.values()}
    assert not sides["train"] & sides["heldout"]
    assert sides["train"] and sides["heldout"]
    assert sides["train"] | sides["heldout"] == {
        "health worker",
        "car",
        "flag samoa",
        "cat",
        "dog",
        "fox",
        "hen",
        "cow",
        "pig",
    }


def test_held_out_share_is_as_asked():
    nouns = [f"noun {i}" for i in range(20000)]
    assert sum(is_heldout(noun, 0.05) for noun in nouns) == pytest.approx(1000, rel=0.1)
    assert not any(is_heldout(noun, 0.0) for noun in nouns) and all(is_heldout(noun, 1.0) for noun in nouns)
    small = {noun for noun in nouns if is_heldout(noun, 0.05)}
    assert small < {noun for noun in nouns if is_heldout(noun, 0.1)}


def test_broken_samples_are_counted_and_named_and_equal_images_kept_once(tmp_path):
    raw = raw_folder(tmp_path / "mine")
    broken = {
        "empty.png": b"",
        "cut.png": dotted_png(RED, (64, 64))[:-20],
        "text.png": b"this is not an image",
        "wrong.jpg": dotted_png(RED),
        "film.mp4": b"0000",
        "bad.svg": b"<svg",
        "blank.svg": SVG.format("").encode(),
    }
    for name, data in broken.items():
        add(raw, name, data)
    add(
        raw,
        "copy.png",
        (raw / "3.png").read_bytes(),
        json.loads((raw / "samples.jsonl").read_text().splitlines()[3])["caption"],
    )
    with (raw / "samples.jsonl").open("a") as file:
        file.write('{"image": "gone.png", "caption": "not there"}\n\nno json\n\n')
    (report,) = build([raw], tmp_path / "shards", BuildOptions(max_broken=0.3))
    names = {entry["what"]: entry["reason"] for entry in report.left_out["broken"]}
    assert set(names) == {*broken, "gone.png", "samples.jsonl:51"}
    assert names["empty.png"] == "zero bytes" and names["blank.svg"] == "the drawing is blank"
    assert names["gone.png"] == "No such file or directory" and "not JSON" in names["samples.jsonl:51"]
    (double,) = report.left_out["duplicates"]
    assert {double["what"], double["reason"].removeprefix("identical to mine/")} == {"mine-00000004", "mine-00000048"}
    assert report.train + report.heldout == 40
    stored = json.loads((tmp_path / "shards" / "mine" / "report.json").read_text())
    assert stored["left_out"] == report.left_out and stored["curation"]["near_duplicates"] == 0.8
    assert "skipped: 9 broken, 1 duplicates" in report.summary()


def test_too_many_broken_samples_write_nothing(tmp_path):
    good, raw = raw_folder(tmp_path / "good"), raw_folder(tmp_path / "mine", count=9)
    add(raw, "cut.png", dotted_png(RED)[:-20])
    with pytest.raises(UserError, match=r"1 of 10 samples are broken, more than 2\.0%.*cut\.png"):
        build([good, raw], tmp_path / "shards", BuildOptions())
    assert list((tmp_path / "shards").iterdir()) == []


def test_what_is_built_is_not_overwritten(tmp_path):
    raw = raw_folder(tmp_path / "mine")
    build([raw], tmp_path / "shards", BuildOptions())
    with pytest.raises(UserError, match="already built"):
        build([raw], tmp_path / "shards", BuildOptions())
    build([raw_folder(tmp_path / "more")], tmp_path / "shards", BuildOptions())  # add another source
    assert set(json.loads((tmp_path / "shards" / "report.json").read_text())) == {"mine", "more"}


def test_every_source_has_a_name_of_its_own(tmp_path):
    """Folders and files of one name, one folder twice, names of SHARDS itself, and raw data in the target's place."""
    one, two = raw_folder(tmp_path / "a" / "train"), raw_folder(tmp_path / "b" / "train")
    (tmp_path / "train.jsonl").write_text((one / "samples.jsonl").read_text())
    before = sorted(tmp_path.rglob("*"))
    for raws in ([one, two], [one, one], [one, tmp_path / "b" / ".." / "a" / "train"], [two, tmp_path / "train.jsonl"]):
        with pytest.raises(UserError, match=r"two sources are called 'train'.*rename one of them") as refused:
            build(raws, tmp_path / "shards", BuildOptions())
        assert all(str(raw) in str(refused.value) for raw in raws)
    with pytest.raises(UserError, match=r"the shards would replace the raw data.*choose another --to"):
        build([one], tmp_path / "a", BuildOptions())
    for name in (".hidden", "report.json", "ATTRIBUTION.md"):
        with pytest.raises(UserError, match=r"a source cannot be called .*rename"):
            build([tmp_path / name], tmp_path / "shards", BuildOptions())
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_input_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no samples\.jsonl"):
        build([tmp_path], tmp_path / "shards", BuildOptions())
    raw = tmp_path / "mine"
    raw.mkdir()
    (raw / "samples.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match=r"no usable sample.*the first is samples\.jsonl:1: not JSON"):
        build([raw], tmp_path / "shards", BuildOptions())
    assert list((tmp_path / "shards").iterdir()) == []
    with pytest.raises(UserError, match="from 0 to 1"):
        BuildOptions(heldout=5)


def test_a_key_is_taken_once(tmp_path):
    raw = raw_folder(tmp_path / "mine", count=2)
    with (raw / "samples.jsonl").open("a") as file:
        file.write('{"key": "k", "image": "0.png", "caption": "x"}\n{"key": "k", "image": "1.png", "caption": "y"}\n')
    (report,) = build([raw], tmp_path / "shards", BuildOptions(max_broken=0.3))
    assert report.left_out["broken"] == [{"what": "k", "reason": "duplicate key"}]
    assert report.train + report.heldout == 3


def drawn(body, head=""):
    return Image.open(io.BytesIO(render_svg((head + SVG.format(body)).encode(), 32)))


def test_a_drawing_is_rendered_on_white_with_its_aspect():
    image = drawn('<rect width="20" height="20" fill="red"/>')
    assert image.size == (32, 16) and image.mode == "RGB"
    assert image.getpixel((3, 8)) == RED and image.getpixel((30, 8)) == (255, 255, 255)


def image_tag(href):
    return f'<image xlink:href="{href}" width="40" height="20"/>'


def test_a_drawing_reads_no_other_file(tmp_path):
    (tmp_path / "red.png").write_bytes(dotted_png(RED))
    path = str(tmp_path / "red.png")
    black = '<rect width="9" height="9"/>'
    embedded = "data:image/png;base64," + base64.b64encode(dotted_png(RED)).decode()
    assert RED in drawn(black + image_tag(embedded)).getdata()  # pictures inside the drawing are rendered
    inner = base64.b64encode(SVG.format(image_tag(path)).encode()).decode()
    for body, head in [
        (image_tag(path), ""),
        (image_tag(f"file://{path}"), ""),
        (image_tag("&#47;" + path[1:]), ""),
        (image_tag("&p;"), f'<!DOCTYPE svg [<!ENTITY p "{path}">]>'),
        (image_tag(f"data:image/svg+xml;base64,{inner}"), ""),
        (image_tag(f"data:image/png;base64,{inner}"), ""),
        (f"<style>rect {{fill: url({path})}}</style>", ""),
    ]:
        assert RED not in drawn(black + body, head).getdata()


LAUGHS = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
USES = "".join(f'<g id="a{i}">{f"""<use xlink:href="#a{i - 1}"/>""" * 10}</g>' for i in range(1, 12))


@pytest.mark.parametrize(
    "data",
    [
        SVG.format("<g>" * 100000 + "</g>" * 100000),
        f'<!DOCTYPE svg [<!ENTITY a0 "ha">{LAUGHS}]>' + SVG.format("<text>&a11;</text>"),
        SVG.format(f'<g id="a0"><rect width="9" height="9"/></g>{USES}<use xlink:href="#a11"/>'),
        SVG.format("&undefined;"),
        "\x1f\x8b compressed",
        "",
        "<html/>",
    ],
    ids=["deep", "entities", "uses", "undefined", "compressed", "empty", "html"],
)
def test_a_hostile_drawing_is_only_unreadable(data):
    with pytest.raises(UnreadableMedia):
        render_svg(data.encode(), 32)


def test_a_large_file_is_refused_unread(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(65 * 2**20)
    checks = MediaChecks(tmp_path, 32, CurationOptions(), frozenset(), REGISTRY)
    found = check_sample(RawSample("k", "noun", (RawPart("image", "large.png"),)), checks)
    assert found == SkippedSample("broken", "large.png", "larger than 64 MiB")


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("health worker: medium skin tone", "health worker"),
        ("man health worker: light skin tone", "health worker"),
        ("Three red Foxes", "fox"),
        ("berries 2", "berry"),
        ("left arrow", "arrow"),
        ("glass of boxes", "box glass"),
        ("red", "red"),  # a caption of variant words only keeps them
        ("７７", "７７"),
    ],
)
def test_nouns(caption, noun):
    assert normalise_noun(caption) == noun
