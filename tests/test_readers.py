"""The raw formats of `megamm data build --from`: all give the same samples; bad files are named, not extracted."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UserError
from megamm.data.build.shards import BuildOptions, build
from megamm.data.raw.readers import READERS, source_name
from megamm.data.raw.samples import Broken, RawSample
from megamm.shards.folder import ShardFolder


def picture(number, kind="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


PICTURES = {name: picture(number) for number, name in enumerate(("cat", "dog", "fox"))}


def as_samples(folder):
    folder.mkdir()
    lines = []
    for name, data in PICTURES.items():
        (folder / f"{name}.png").write_bytes(data)
        lines.append(json.dumps({"image": f"{name}.png", "caption": f"a {name}"}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder


def as_jsonl(folder):
    as_samples(folder)
    return (folder / "samples.jsonl").rename(folder / "train.jsonl")


def as_folder(folder):
    (folder / "sub").mkdir(parents=True)
    for name, data in PICTURES.items():
        (folder / "sub" / f"{name}.png").write_bytes(data)
        (folder / "sub" / f"{name}.txt").write_text(f"a {name}")
    (folder / "ATTRIBUTION.md").write_text("mine")
    (folder / ".hidden").write_text("x")
    return folder


def as_webdataset(folder):
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%04d.tar"), maxcount=2, verbose=0) as writer:
        for name, data in PICTURES.items():
            writer.write({"__key__": f"deep/er/{name}", "png": data, "json": {"caption": f"a {name}", "width": 8}})
    return folder


def as_parquet(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    images = [{"bytes": data, "path": None} for data in PICTURES.values()]
    table = pyarrow.table({"image": images, "text": [f"a {name}" for name in PICTURES], "width": [8, 8, None]})
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    return folder


def as_arrow(folder):
    """Write what datasets.save_to_disk writes: streams of record batches."""
    pyarrow = pytest.importorskip("pyarrow")
    (folder / "train").mkdir(parents=True)
    table = pyarrow.table({"image": list(PICTURES.values()), "caption": [f"a {name}" for name in PICTURES]})
    with pyarrow.OSFile(str(folder / "train" / "data-00000-of-00001.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return folder


FORMS = {
    "samples": as_samples,
    "jsonl": as_jsonl,
    "folder": as_folder,
    "webdataset": as_webdataset,
    "hf-datasets": as_parquet,
    "hf-datasets of save_to_disk": as_arrow,
}


@pytest.mark.parametrize(
    ("form", "workers"),
    # Also in a worker if media are inside other files.
    [*((form, 0) for form in FORMS), ("webdataset", 1), ("hf-datasets", 1)],
)
def test_every_form_gives_the_same_samples(tmp_path, form, workers):
    raw = FORMS[form](tmp_path / "mine")
    (report,) = build([raw], tmp_path / "shards", BuildOptions(form=form.split()[0], heldout=0), workers)
    assert report.train == report.samples == 3
    train = tmp_path / "shards" / source_name(raw) / "train"
    texts, images = ShardFolder(train / "text"), ShardFolder(train / "image")
    assert texts.keys == images.keys
    found = {texts.read(i).decode(): images.read(i) for i in range(3)}
    assert found == {f"a {name}": data for name, data in PICTURES.items()}


def test_all_forms_are_tried():
    assert {form.split()[0] for form in FORMS} == set(READERS)


def test_the_command_takes_every_option(tmp_path):
    raw = as_folder(tmp_path / "mine")
    command = ["data", "build", str(raw), "--to", str(tmp_path / "shards"), "--from", "folder", "--heldout", "0"]
    command += ["--min-characters", "2", "--max-characters", "99", "--language", "en", "--near-duplicates", "0.9"]
    command += [
        "--min-side",
        "4",
        "--max-aspect",
        "3",
        "--min-seconds",
        "1",
        "--max-seconds",
        "2",
        "--max-clipped",
        "0",
    ]
    result = CliRunner().invoke(app, [*command, "--keep-blank", "--mask-pii"])
    assert result.exit_code == 0, result.output
    assert "mine: 3 train + 0 heldout of 3 samples: 3 image (0.0 MiB), 3 text (0.0 MiB); skipped: none" in result.output
    curation = json.loads((tmp_path / "shards" / "report.json").read_text())["mine"]["curation"]
    assert curation["languages"] == ["en"] and curation["max_aspect"] == 3.0 and curation["mask_pii"] is True


def read(form, raw, spool):
    spool.mkdir()
    entries = list(READERS[form](raw, spool))
    samples = {e.key: e for e in entries if isinstance(e, RawSample)}
    return samples, {e.what: e.reason for e in entries if isinstance(e, Broken)}


def test_a_folder_with_unfit_files(tmp_path):
    raw = tmp_path / "mine"
    raw.mkdir()
    for name in ("a.png", "b.png", "b.webp", "c.png", "d.xyz", "e.txt", "g.jpeg"):
        (raw / name).write_bytes(b"not looked at yet")
    (raw / "a.json").write_text('{"caption": "from json", "noun": "thing"}')
    (raw / "c.txt").write_bytes(b"\xff\xfe")
    (raw / "out.png").symlink_to("/etc/hostname")
    os.mkfifo(raw / "pipe.png")
    samples, broken = read("folder", raw, tmp_path / "spool")
    assert {key: [p.content for p in s.parts] for key, s in samples.items()} == {
        "a": ["from json", "a.png"],
        "e": ["not looked at yet"],
        "g": ["g.jpeg"],
    }
    assert samples["a"].noun == "thing"
    assert set(broken) == {"b", "c", "d", "out.png", "pipe.png"}
    assert broken["b"].startswith("two image members") and "not UTF-8" in broken["c"] and "no parts" in broken["d"]
    assert "leads outside" in broken["out.png"] and broken["pipe.png"] == "not a regular file"


def add(file, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    file.addfile(info, io.BytesIO(data))


def test_tars_with_unfit_members(tmp_path):
    raw = tmp_path / "mine"
    raw.mkdir()
    with tarfile.open(raw / "a.tar", "w") as file:
        add(file, "deep", type=tarfile.DIRTYPE)
        add(file, "deep/one.txt", b"text of one")
        add(file, "deep/one.PNG", b"image")
        add(file, "deep/one.seg.png", b"mask")
        add(file, "deep/one.pyd", b"not looked at")
        add(file, "../../up.txt", b"out")
        add(file, "/abs.txt", b"out")
        add(file, "sym.png", type=tarfile.SYMTYPE, linkname="/etc/hostname")
        add(file, "sym.txt", b"goes with its link")
        add(file, "dev.png", type=tarfile.CHRTYPE)
        add(file, "three.cls", b"7")
        add(file, "two.json", b"{")
        add(file, "page.1.png", b"image")
        add(file, "page.0.txt", b"text of page")
        add(file, "gap.0.txt", b"x")
        add(file, "gap.2.txt", b"x")
        add(file, "twice.txt", b"x")
        add(file, "twice.txt", b"y")
    (raw / "b.tar").write_bytes((raw / "a.tar").read_bytes()[: 512 * 5 + 100])
    (raw / "c.tar").write_bytes(b"\x1f\x8b is compressed")
    samples, broken = read("webdataset", raw, tmp_path / "spool")
    one, page, three = (
        next(s for k, s in samples.items() if k.startswith(n)) for n in ("a-deep-one", "a-page", "a-three")
    )
    assert [p.content for p in one.parts] == ["text of one", "a.tar:deep/one.PNG"] and one.ignored == ("pyd", "seg.png")
    span = one.parts[1].byte_range
    assert (raw / "a.tar").read_bytes()[span.offset : span.offset + span.size] == b"image"
    assert page.ordered and [p.modality for p in page.parts] == ["text", "image"] and three.parts[0].content == "7"
    reasons = {
        "a.tar:../../up.txt": "leads out",
        "a.tar:/abs.txt": "leads out",
        "a.tar:sym.png": "a link",
        "a.tar:dev.png": "a device",
        "a.tar:two": "not valid JSON",
        "a.tar:gap": "not numbered 0, 1, 2",
        "a.tar:twice": "two members .txt",
        "b.tar": "truncated",
        "c.tar": "unreadable",
    }
    assert set(broken) == set(reasons)
    assert all(reason in broken[what] for what, reason in reasons.items())
    assert list((tmp_path / "spool").iterdir()) == []


def test_tables_with_unfit_rows(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = tmp_path / "mine"
    raw.mkdir()
    audio = {"bytes": b"RIFF....WAVE", "path": "speech.wav"}
    rows = {
        "image": [picture(0, "JPEG"), None, b"?", None],
        "audio": [None, audio, None, {"bytes": None, "path": "/etc/hostname"}],
        "text": ["one", "two", "three", "four"],
        "key": ["k/1", "k-2", "k-3", "k-4"],
    }
    parquet.write_table(pyarrow.table(rows), raw / "a.parquet")
    (raw / "b.parquet").write_bytes((raw / "a.parquet").read_bytes()[:-50])
    samples, broken = read("hf-datasets", raw, tmp_path / "spool")
    first = next(s for k, s in samples.items() if k.startswith("k-1-"))
    assert first.parts[1].content.endswith("/image.jpg")
    span = first.parts[1].byte_range
    assert span.file.read_bytes()[span.offset : span.offset + span.size] == picture(0, "JPEG")
    assert samples["k-3"].parts[1].content.endswith(".unknown")
    assert "unreadable from row 1" in broken["b.parquet"]
    assert not any("etc" in p.content for s in samples.values() for p in s.parts)


@pytest.mark.parametrize("form", ["samples", "folder", "jsonl", "webdataset", "hf-datasets"])
def test_nothing_there_is_one_clear_line(tmp_path, form):
    for raw in (tmp_path, Path(tmp_path / "gone")):
        if form != "folder" or raw != tmp_path:
            with pytest.raises(UserError, match=r"no|not a file"):
                list(READERS[form](raw, tmp_path))
    with pytest.raises(UserError, match="choose from samples, folder, jsonl, webdataset, hf-datasets"):
        BuildOptions(form="zip")
