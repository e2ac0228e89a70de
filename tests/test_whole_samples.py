"""A sample is whole or not there: people's folders, tars and tables with parts that are unusual, lost or no data."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UserError
from megamm.data.build.shards import BuildOptions, build
from megamm.data.raw.readers import READERS
from megamm.data.raw.samples import Broken, NoData, RawSample
from megamm.shards.folder import ShardFolder


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def folder(path, **files):
    """Write files; a name has `__` for a slash and `_` for the last dot."""
    for name, data in files.items():
        file = path / ".".join(name.replace("__", "/").rsplit("_", 1))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tar(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def read(form, raw, *may_miss):
    """Return {key: [(modality, content)]}, {what: reason} and the names of files that are not data."""
    spool = raw.parent / f"{raw.name}.spool"
    spool.mkdir(exist_ok=True)
    entries = list(READERS[form](raw, spool, frozenset(may_miss)))
    samples = [entry for entry in entries if isinstance(entry, RawSample)]
    return (
        {s.key: [(p.modality, p.content if p.modality == "text" else content(p)) for p in s.parts] for s in samples},
        {entry.what: entry.reason for entry in entries if isinstance(entry, Broken)},
        [entry.what for entry in entries if isinstance(entry, NoData)],
    )


def content(part):
    """Return a medium's bytes if it is inside another file, else its name."""
    if part.byte_range is None:
        return part.content
    with part.byte_range.file.open("rb") as file:
        file.seek(part.byte_range.offset)
        return file.read(part.byte_range.size)


# Files that are not data.


def test_files_of_operating_systems_are_skipped_and_counted(tmp_path):
    names = [
        "._cat.png",
        "__MACOSX/._cat.png",
        "__MACOSX/dog.png",
        ".DS_Store",
        "Thumbs.db",
        "@eaDir/cat.png",
        "a/._b.txt",
    ]
    raw = folder(tmp_path / "f", cat_png=picture(0), cat_txt="a cat")
    for name in names:
        (raw / name).parent.mkdir(exist_ok=True)
        (raw / name).write_bytes(b"\0\5\x16\7 of macOS")
    samples, broken, skipped = read("folder", raw)
    assert list(samples) == ["cat"] and not broken and sorted(skipped) == sorted(names)
    members = [("./cat.png", picture(0)), ("cat.txt", b"a cat"), *((name, b"\0\5\x16\7") for name in names)]
    tar(tmp_path / "t/0.tar", *members)
    tar(tmp_path / "t/._0.tar", *members)
    samples, broken, skipped = read("webdataset", tmp_path / "t")
    assert len(samples) == 1 and not broken and len(skipped) == len(names) + 1
    (report,) = build([tmp_path / "t"], tmp_path / "s", BuildOptions(form="webdataset", heldout=0))
    assert report.no_data.total() == len(names) + 1 and report.samples == 1
    assert any("not read: 8 files of the operating system" in line for line in report.details())


def arrow(path, texts):
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": texts})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def state(path, *names, **fields):
    path.mkdir(parents=True, exist_ok=True)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **fields}))


def texts_of(samples):
    return sorted(text for parts in samples.values() for _, text in parts)


def test_of_a_saved_data_set_only_what_it_names_is_read(tmp_path):
    raw = tmp_path / "d"
    arrow(raw / "train/data-00000-of-00001.arrow", ["kept"])
    state(raw / "train", "data-00000-of-00001.arrow")
    for stale in ("train/cache-1b2c.arrow", "train/data-00000-of-00002.arrow", "old/data-00000-of-00001.arrow"):
        arrow(raw / stale, ["stale"])
    state(raw / "old", "data-00000-of-00001.arrow")
    (raw / "dataset_dict.json").write_text('{"splits": ["train"]}')
    samples, _, skipped = read("hf-datasets", raw)
    assert texts_of(samples) == ["kept"] and len(skipped) == 3
    assert texts_of(read("hf-datasets", raw / "train")[0]) == ["kept"]
    # The library's cache folder has no state.json, but its cache files have such names.
    arrow(tmp_path / "cache/x-train.arrow", ["kept"])
    arrow(tmp_path / "cache/cache-77.arrow", ["stale"])
    arrow(tmp_path / "cache/._x-train.arrow", ["stale"])
    assert texts_of(read("hf-datasets", tmp_path / "cache")[0]) == ["kept"]


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        (["gone.arrow"], {}, "names gone.arrow, which is missing"),
        (["../a.arrow"], {}, "files of another folder"),
        (["a.arrow"], {"_indices_data_files": [{"filename": "indices.arrow"}]}, "indices mapping"),
        ([7], {}, "files of another folder"),
    ],
)
def test_an_unusable_state_is_one_line(tmp_path, names, fields, message):
    arrow(tmp_path / "d/a.arrow", ["x"])
    state(tmp_path / "d", *names, **fields)
    with pytest.raises(UserError, match=message):
        read("hf-datasets", tmp_path / "d")


# Metadata files of imagefolder, audiofolder and videofolder.

LINES = [{"file_name": "a.png", "text": "an a"}, {"file_name": "sub/b.png", "text": "a b", "width": 3}]


def metadata(kind, rows):
    if kind == "jsonl":
        return "\n".join(map(json.dumps, rows))
    if kind == "csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        return "\n".join([",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)])
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_files_give_the_captions(tmp_path, kind, column):
    rows = [{column if name == "text" else name: value for name, value in row.items()} for row in LINES]
    raw = folder(tmp_path / "f", a_png=b"1", sub__b_png=b"2", c_png=b"3", d_png=b"4", d_txt="a d")
    (raw / f"metadata.{kind}").write_bytes(metadata(kind, rows) if kind == "parquet" else metadata(kind, rows).encode())
    samples, broken, _ = read("folder", raw)
    assert sorted(samples.values()) == [
        [("text", "a b"), ("image", "sub/b.png")],
        [("text", "a d"), ("image", "d.png")],
        [("text", "an a"), ("image", "a.png")],
    ]
    assert set(broken) == {"c"} and "no line of the metadata file" in broken["c"]
    assert len(read("folder", raw, "text")[0]) == 4


def test_metadata_of_a_subfolder_other_modalities_and_more_captions(tmp_path):
    raw = folder(tmp_path / "f", x__a_png=b"1", x__a_flac=b"2", y__v_mp4=b"3", y__w_png=b"4", free_png=b"5")
    (raw / "x/metadata.jsonl").write_text(
        metadata("jsonl", [{"file_name": "a.png", "text": t} for t in ("one", "two")])
    )
    row = {"video_file_name": "v.mp4", "image_file_name": "w.png", "text": "both", "noun": "n"}
    (raw / "y/metadata.csv").write_text(metadata("csv", [row]))
    samples, broken, _ = read("folder", raw)
    assert not broken and sorted(map(len, samples.values())) == [1, 3, 3, 3]
    assert [("text", "both"), ("image", "y/w.png"), ("video", "y/v.mp4")] in samples.values()
    assert [("text", "two"), ("image", "x/a.png"), ("audio", "x/a.flac")] in samples.values()


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("jsonl", '{"file_name": "gone.png", "text": "x"}', "is not a file below its folder"),
        ("jsonl", '{"file_name": "../out.png", "text": "x"}', "is not a file below its folder"),
        ("jsonl", '{"file_name": "a.png", "prompt": "x"}', 'no "text" or "caption" (other fields: prompt)'),
        ("jsonl", '{"file_name": "a.png", "text": ""}', 'the "text" of its .json is empty'),
        ("jsonl", '{"text": "x"}', 'names no file: add "file_name"'),
        ("jsonl", '{"file_names": ["a.png"], "text": "x"}', "lists (file_names)"),
        ("jsonl", "{", "not JSON"),
        ("csv", "file_name,text\na.png,one, two", "another number of fields"),
        ("csv", "file_name,text\na.png", "another number of fields"),
    ],
)
def test_unusable_lines_of_metadata_are_named(tmp_path, kind, text, reason):
    raw = folder(tmp_path / "f", a_png=b"1")
    (tmp_path / "out.png").write_bytes(b"")
    (raw / f"metadata.{kind}").write_text(text)
    samples, broken, _ = read("folder", raw)
    assert not samples and reason in broken[f"metadata.{kind}:{2 if kind == 'csv' else 1}"]


# Parts that would be lost.

LOST = ["x.jxl", "x.CR2", "x.wma", "x.avi", "x.fbx", "x.npy"]


@pytest.mark.parametrize("name", LOST)
def test_a_caption_alone_is_not_trained_on(tmp_path, name):
    raw = folder(tmp_path / "f", x_txt="a cat", y_txt="text alone", y_md="notes")
    (raw / name).write_bytes(b"?")
    samples, broken, _ = read("folder", raw)
    assert list(samples) == ["y"] and f".{name.rpartition('.')[2].lower()} " in broken["x"]
    tar(tmp_path / "t/0.tar", ("x.txt", b"a cat"), (name, b"?"), ("y.txt", b"text alone"))
    samples, broken, _ = read("webdataset", tmp_path / "t")
    assert list(samples.values()) == [[("text", "text alone")]] and len(broken) == 1
    modality = {"jxl": "image", "cr2": "image", "wma": "audio", "avi": "video", "fbx": "points"}.get(
        name.rpartition(".")[2].lower(), "other"
    )
    assert set(read("folder", raw, modality)[0]) == {"x", "y"}


def test_a_picture_whose_caption_is_unreadable_or_elsewhere_is_left_out(tmp_path):
    members = [(f"{key}.png", picture(0)) for key in "abcdef"]
    members += [("a.json", b"{"), ("b.json", b'{"caption": ""}'), ("c.alt.txt", b"x"), ("d.txt", b"\xff\xfe")]
    members += [("e.json", b'{"width": 3}'), ("f.caption", b"kohya's ending")]
    tar(tmp_path / "t/0.tar", *members)
    samples, broken, _ = read("webdataset", tmp_path / "t")
    assert sorted(map(len, samples.values())) == [1, 2] and {what[-1] for what in broken} == set("abcd")
    samples, broken, _ = read("webdataset", tmp_path / "t", "text")
    assert len(samples) == 6 and not broken


def test_a_caption_named_after_the_whole_file_belongs_to_it(tmp_path):
    raw = folder(tmp_path / "f")
    raw.mkdir()
    for name, data in (
        ("cat.png", picture(0)),
        ("cat.png.txt", b"a cat"),
        ("dog.v1.png", b"2"),
        ("dog.v1.txt", b"a dog"),
    ):
        (raw / name).write_bytes(data)
    samples, broken, _ = read("folder", raw)
    assert not broken and sorted(samples.values()) == [
        [("text", "a cat"), ("image", "cat.png")],
        [("text", "a dog"), ("image", "dog.v1.png")],
    ]


def test_media_in_fields_of_other_names_are_not_dropped(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"img": {"bytes": picture(0), "path": None}, "text": "a", "mask": None, "source": "https://x.org/a.png"},
        {"image": picture(0), "mask": picture(1), "text": "b"},
        {"text": "c", "source": "https://x.org/a.png"},
    ]
    (tmp_path / "d").mkdir()
    for number, row in enumerate(rows):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"d/{number}.parquet")
    samples, broken, _ = read("hf-datasets", tmp_path / "d")
    assert texts_of({k: [p for p in v if p[0] == "text"] for k, v in samples.items()}) == ["b", "c"]
    assert broken == {"0-00000001": 'column "img" holds image: call the column "image", or remove it'}
    assert len(read("hf-datasets", tmp_path / "d", "image")[0]) == 3
    raw = tmp_path / "mine"
    raw.mkdir()
    lines = [
        {"img": "a.png", "text": "x"},
        {"image": "a.png", "thumbnail": "b.jpg"},
        {"text": "y", "url": "http://a/b.png"},
    ]
    (raw / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples, broken, _ = read("samples", raw)
    assert len(samples) == 2 and 'field "img" names a file of image' in broken["samples.jsonl:1"]


def test_what_may_be_missing_is_dropped_counted_and_named(tmp_path):
    """Without the option the sample is left out; with it, a page keeps its order."""
    raw = tmp_path / "mine"
    raw.mkdir()
    lines = [{"key": f"k{n}", "image": f"{n}.png", "text": f"text {n}"} for n in range(6)]
    lines += [{"key": "page", "parts": [{"text": "one"}, {"image": "0.png"}, {"image": "5.png"}, {"text": "two"}]}]
    lines += [{"key": "lone", "image": "0.png"}, {"key": "empty", "image": None, "text": "z"}]
    (raw / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for number in range(6):
        (raw / f"{number}.png").write_bytes(picture(number) if number > 3 else b"not a picture")
    strict, lenient = (BuildOptions(heldout=0, max_broken=1, allow_missing=allowed) for allowed in ((), ("image",)))
    (report,) = build([raw], tmp_path / "s", strict)
    assert report.train == 2 and len(report.left_out["broken"]) == 7
    (line,) = [line for line in report.details() if "not a PNG" in line]
    assert line.startswith("  broken: 6 x not a PNG") and line.count(".png") == 3 and line.endswith(", ...)")
    written = json.loads((tmp_path / "s/report.json").read_text())["mine"]["reasons"]["broken"]
    assert [reason["count"] for reason in written] == [6, 1] and len(written[0]["first"]) == 3
    (report,) = build([raw], tmp_path / "l", lenient)
    assert report.train == 8 and [entry["what"] for entry in report.left_out["broken"]] == ["0.png"]
    assert {entry["what"] for entry in report.missing["image"]} == {"k0", "k1", "k2", "k3", "page", "empty"}
    page = sorted(path.name for path in (tmp_path / "l/mine/train").iterdir())
    assert page == ["image", "text"] and any("used without image: 5 x" in line for line in report.details())
    texts = ShardFolder(tmp_path / "l/mine/train/text")
    assert [number for key, number in zip(texts.keys, texts.parts, strict=True) if key == "page"] == [0, 2]


def test_the_command_says_what_may_be_missing(tmp_path):
    raw = folder(tmp_path / "f", x_txt="a cat", x_jxl=b"?")
    command = ["data", "build", str(raw), "--to", str(tmp_path / "s"), "--from", "folder", "--heldout", "0"]
    result = CliRunner().invoke(app, [*command, "--allow-missing", "image"])
    assert result.exit_code == 0 and "used without image: 1 x its image .jxl is not read" in result.output
    with pytest.raises(UserError, match="unknown modality 'smell'; choose from text, image"):
        BuildOptions(allow_missing=("smell",))


# Lists of media in tables.


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"images": [1, 2], "text": "both"}, [1, 2, "both"]),
        ({"image": [1, 2], "caption": "both"}, [1, 2, "both"]),
        ({"images": [1], "text": None}, [1]),
        ({"images": [1, 2], "text": "a <image> b <image> c"}, ["a ", 1, " b ", 2, " c"]),
        ({"images": [1, None, 2], "texts": [None, "between", None]}, [1, "between", 2]),
        ({"images": [1, None], "texts": ["of it", "after"]}, [1, "of it", "after"]),
        ({"images": [1, 2], "text": "only <image>"}, "its text has 1 <image> for 2 media"),
        ({"images": [1, None], "text": "x"}, "has holes"),
        ({"images": [1], "texts": ["a", "b"]}, "must have one length"),
    ],
)
@pytest.mark.parametrize("as_struct", [True, False])
def test_a_list_of_pictures_is_a_page(tmp_path, row, expected, as_struct):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def cell(value):
        if isinstance(value, int):
            return {"bytes": picture(value), "path": "x.png"} if as_struct else picture(value)
        return [cell(item) for item in value] if isinstance(value, list) else value

    (tmp_path / "d").mkdir()
    row = {name: cell(value) for name, value in row.items()}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d/a.parquet")
    samples, broken, _ = read("hf-datasets", tmp_path / "d")
    if isinstance(expected, str):
        assert expected in broken["a-00000001"] and not samples
        return
    ((_, parts),) = samples.items()
    wanted = [("image", picture(e)) if isinstance(e, int) else ("text", e.strip()) for e in expected]
    assert [(modality, c.strip() if modality == "text" else c) for modality, c in parts] == wanted
    if as_struct and wanted == [("image", picture(1)), ("image", picture(2)), ("text", "both")]:
        (report,) = build([tmp_path / "d"], tmp_path / "s", BuildOptions(form="hf-datasets", heldout=0))
        assert report.train == 1 and report.parts == {"image": 2, "text": 1}


# Keys of WebDataset tars.


def test_members_of_a_key_may_be_anywhere_in_the_tar(tmp_path):
    members = [*((f"{k}.png", picture(i)) for i, k in enumerate("abc")), *((f"{k}.txt", k.encode()) for k in "cab")]
    tar(tmp_path / "t/0.tar", *members)
    samples, broken, _ = read("webdataset", tmp_path / "t")
    assert not broken and [parts[0][1] for parts in samples.values()] == ["a", "b", "c"]
    assert [parts[1][1] for parts in samples.values()] == [picture(0), picture(1), picture(2)]


@pytest.mark.parametrize(
    "names", [["img.v1.png", "img.v1.txt"], ["p.17.png", "p.17.txt"], ["a.1.png", "a.2.png", "a.txt"]]
)
def test_dots_in_keys_are_explained(tmp_path, names):
    tar(tmp_path / "t/0.tar", *((name, b"text") for name in names))
    samples, broken, _ = read("webdataset", tmp_path / "t")
    (reason,) = broken.values()
    assert not samples and f"the key ends at the first dot, so 0.tar:{names[0]} has the key" in reason
    assert "replace other dots" in reason and repr(names[0].partition(".")[0]) in reason


def test_a_tar_that_is_cut_loses_its_last_sample_too(tmp_path):
    path = tar(tmp_path / "t/0.tar", ("a.png", picture(0)), ("a.txt", b"a"), ("b.png", picture(1)), ("b.txt", b"b"))
    path.write_bytes(path.read_bytes()[: 512 * 6 + 100])
    samples, broken, _ = read("webdataset", tmp_path / "t")
    assert [parts[0][1] for parts in samples.values()] == ["a"] and "of 'b'" in broken["0.tar"]
