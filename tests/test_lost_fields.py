"""Fields and columns of unknown names that hold a sample's text or medium: the sample is named, not used without them.

The forms are those of published data sets: LAION (URL, caption), COCO (captions), Common Voice (sentence), audiofolder
(transcription), LLaVA (conversations), VQA (question, answer), and of img2dataset.
"""

import json

import pytest
from media_samples import example

from megamm.data.raw.lost_fields import lost_fields
from megamm.data.raw.readers import READERS
from megamm.data.raw.samples import Broken, RawSample

PICTURE = example("image", 0)[0]
LOST_TEXTS = {
    "captions": ["a cat", "a small cat"],
    "sentence": "a cat",
    "transcription": "a cat",
    "normalizedText": "a cat",
    "TEXT": "a cat",
    "prompt": "a cat",
    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}],
}
NO_TEXTS = {"label": 3, "text_length": 12, "caption_score": "0.3", "prompt_id": "7", "captions": [], "sentence": None}


def read(kind, raw, tmp_path, *may_miss):
    spool = tmp_path / f"spool-{len(list(tmp_path.iterdir()))}"
    spool.mkdir()
    return list(READERS[kind](raw, spool, frozenset(may_miss)))


@pytest.mark.parametrize("name", LOST_TEXTS)
def test_a_text_under_another_name_is_not_dropped(name, tmp_path):
    """From a line, a row of a table and a .json beside a picture."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "a.json").write_text(json.dumps({name: LOST_TEXTS[name]}))
    (tmp_path / "lines.jsonl").write_text(json.dumps({"image": "a.png", name: LOST_TEXTS[name]}))
    table = pyarrow.Table.from_pylist([{"image": PICTURE, name: LOST_TEXTS[name]}])
    parquet.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "folder").mkdir()
    for extension in ("png", "json"):
        (tmp_path / f"a.{extension}").rename(tmp_path / f"folder/a.{extension}")
    for kind, raw in (("jsonl", "lines.jsonl"), ("hf-datasets", "t.parquet"), ("folder", "folder")):
        (entry,) = read(kind, tmp_path / raw, tmp_path)
        assert isinstance(entry, Broken) and f'field "{name}" seems to be its text' in entry.reason
        (entry,) = read(kind, tmp_path / raw, tmp_path, "text")
        assert isinstance(entry, RawSample) and [lost.modality for lost in entry.missing] == ["text"]


@pytest.mark.parametrize("name", NO_TEXTS)
def test_notes_about_a_picture_are_no_texts(name, tmp_path):
    (tmp_path / "lines.jsonl").write_text(json.dumps({"image": "a.png", name: NO_TEXTS[name]}))
    (entry,) = read("jsonl", tmp_path / "lines.jsonl", tmp_path)
    assert isinstance(entry, RawSample)


def test_captions_of_media_on_the_web_are_not_used_alone(tmp_path):
    lines = [
        {"url": "https://x.org/a.jpg?w=2", "caption": "a cat"},
        {"image_url": "https://x.org/17", "text": "a cat"},
        {"videoUrl": "https://x.org/17", "text": "a cat"},
        {"url": "https://x.org/a.jpg", "text": "a page about a cat"},
        {"url": "https://x.org/cat.html", "caption": "a cat"},
        {"image": "a.png", "image_url": "https://x.org/a.png", "text": "a cat"},
        {"meta": {"photo_url": "https://[broken.org/a.png"}, "text": "a cat"},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    entries = read("jsonl", tmp_path / "lines.jsonl", tmp_path)
    assert [isinstance(entry, Broken) for entry in entries] == [True, True, True, False, False, False, False]
    assert "address of image on the web, which is not fetched: download it" in entries[0].reason
    assert "--allow-missing video" in entries[2].reason


def test_media_in_lists_and_structures_are_not_dropped(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    media = {"bytes": PICTURE, "path": None}
    rows = {"s": {"picture": media}, "l": [media], "n": [{"inner": [media]}], "p": ["a.png"]}
    for name, value in rows.items():
        parquet.write_table(pyarrow.Table.from_pylist([{name: value, "text": "a cat"}]), tmp_path / f"{name}.parquet")
    entries = read("hf-datasets", tmp_path, tmp_path)
    assert len(entries) == 4 and all(isinstance(entry, Broken) and "image" in entry.reason for entry in entries)
    assert not list(lost_fields({"images": ["a.png", "b.png"]}, {"image"}))


def test_a_list_of_captions_is_named(tmp_path):
    (tmp_path / "lines.jsonl").write_text(json.dumps({"image": "a.png", "caption": ["a", "b"]}))
    (entry,) = read("jsonl", tmp_path / "lines.jsonl", tmp_path)
    assert entry.reason == '"caption" is a list of 2: give one, or write a line for each'


def test_columns_and_rows_that_python_cannot_hold_do_not_end_a_table(tmp_path):
    """Nanoseconds, the year 30,000,000, an unknown time zone, and one text that is not UTF-8."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "text": pyarrow.array([b"one", b"\xff\xfe", b"three", b"four"], pyarrow.binary()).view(pyarrow.string()),
        "nanoseconds": pyarrow.array([1, 2, None, 123456789], pyarrow.timestamp("ns")),
        "far": pyarrow.array([10**15] * 4, pyarrow.timestamp("s")),
        "zone": pyarrow.array([1] * 4, pyarrow.timestamp("s", tz="Mars/Olympus")),
        "duration": pyarrow.array([123456789] * 4, pyarrow.duration("ns")),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    entries = read("hf-datasets", tmp_path / "t.parquet", tmp_path)
    assert [e.parts[0].content for e in entries if isinstance(e, RawSample)] == ["one", "three", "four"]
    assert entries[1].reason.startswith("unreadable: 'utf-8' codec can't decode byte 0xff")


def test_both_forms_of_arrow_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [f"text {n}" for n in range(100)]})
    for name, writer in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with writer(tmp_path / f"{name}.arrow", table.schema) as opened:
            opened.write_table(table, max_chunksize=70)
        entries = read("hf-datasets", tmp_path / f"{name}.arrow", tmp_path)
        assert [entry.parts[0].content for entry in entries] == [f"text {n}" for n in range(100)]


def test_media_of_tables_have_the_format_of_their_bytes(tmp_path):
    """Paths in tables are where media came from: addresses, with another extension or none."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = ["https://x.org/a.jpg?width=20", "a.jpg", "a.17", None, "a.PNG"]
    rows = [{"image": {"bytes": PICTURE, "path": path}} for path in paths]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    entries = read("hf-datasets", tmp_path / "t.parquet", tmp_path)
    assert [entry.parts[0].content.rpartition(".")[2] for entry in entries] == ["png"] * 5
