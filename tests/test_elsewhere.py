"""Media whose texts are in a list or a parallel folder are named, instead of being trained on without them.

The layouts are those of published data sets: Flickr8k (captions.txt, Flickr8k.token.txt), LibriSpeech (*.trans.txt),
LJSpeech, COCO (captions.json), VCTK (wav48/p1/*.wav beside txt/p1/*.txt).
"""

import json
import os

import pytest
from media_samples import example

from megamm.data.raw.folders import read_folder
from megamm.data.raw.samples import Broken, NoData, RawSample

PICTURE = example("image", 0)[0]
SOUND = example("audio", 0)[0]
LISTS = {
    "flickr8k": ("Images/1000_ab.png", "captions.txt", "image,caption\n1000_ab.png,A child in a dress .\n"),
    "flickr8k tokens": ("Images/1000_ab.png", "text/Flickr8k.token.txt", "1000_ab.png#0\tA child in a dress .\n"),
    "librispeech": ("84/121123/84-121123-0000.flac", "84/121123/84-121123.trans.txt", "84-121123-0000 GO ON\n"),
    "coco": ("val/0001.png", "captions.json", json.dumps({"images": [{"file_name": "0001.png"}]})),
    "csv": ("a.png", "captions.csv", "image,caption\na.png,a cat\n"),
    "tsv": ("a.png", "metadata.tsv", "file_name\ttext\nimages/a.png\ta cat\n"),
    "jsonl": ("a.png", "data.jsonl", json.dumps({"image": "a.png", "text": "a cat"})),
    "ljspeech": ("wavs/LJ001-0001.flac", "transcripts.csv", "LJ001-0001|Printing|Printing\n"),
    "spreadsheet": ("a.png", "captions.xlsx", "PK"),
}


def write(folder, **files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def read(folder, *may_miss):
    return list(read_folder(folder, folder, frozenset(may_miss)))


@pytest.mark.parametrize("layout", LISTS)
def test_media_described_by_a_list_are_not_used_without_their_text(layout, tmp_path):
    medium, listed, content = LISTS[layout]
    write(tmp_path, **{medium: SOUND if medium.endswith("flac") else PICTURE, listed: content})
    broken, note = sorted(read(tmp_path), key=lambda entry: isinstance(entry, NoData))
    assert isinstance(broken, Broken) and f"no text, and the list {listed} is not read" in broken.reason
    assert isinstance(note, NoData) and note.what == listed
    sample = next(entry for entry in read(tmp_path, "text") if isinstance(entry, RawSample))
    assert len(sample.parts) == 1


def test_texts_in_a_parallel_folder_are_named(tmp_path):
    write(tmp_path, **{"wav/p1/1.flac": SOUND, "txt/p1/1.txt": "one", "wav/p1/2.flac": SOUND, "txt/p1/2.txt": "two"})
    reasons = {entry.what: entry.reason for entry in read(tmp_path)}
    assert "its text is in another folder (txt/p1/1): put both into one" in reasons["wav/p1/1"]
    assert "its medium is in another folder (wav/p1/2): put both into one" in reasons["txt/p1/2"]


def test_texts_and_media_of_their_own_remain_samples(tmp_path):
    write(
        tmp_path,
        **{
            "a.png": PICTURE,
            "b.png": PICTURE,
            "b.txt": "a picture named a.png is beside this one",
            "story.txt": "a cat sat.\nIt slept.\nb went away.\n",
            "notes.csv": "width,height\n3,4\n",
        },
    )
    entries = read(tmp_path)
    assert sorted(entry.key for entry in entries if isinstance(entry, RawSample)) == ["a", "b", "story"]
    assert [entry.what for entry in entries if isinstance(entry, Broken)] == ["notes"]


def test_names_of_two_unicode_forms_and_of_windows_are_the_same_file(tmp_path):
    write(tmp_path, **{"e\u0301.png": PICTURE, "\u00e9.txt": "one", "deep/u\u0308.png": PICTURE})
    write(tmp_path, **{"deep/metadata.csv": "file_name,text\n\u00fc.png,two\n"})
    write(tmp_path, **{"win/a/b.png": PICTURE, "win/metadata.csv": "file_name,text\na\\b.png,three\n"})
    samples = read(tmp_path)
    assert sorted(sample.parts[0].content for sample in samples) == ["one", "three", "two"]
    assert all(len(sample.parts) == 2 and (tmp_path / sample.parts[1].content).is_file() for sample in samples)


def test_a_name_that_is_not_utf_8_is_named(tmp_path):
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.png", os.O_CREAT | os.O_WRONLY))
    (entry,) = read(tmp_path)
    assert isinstance(entry, Broken) and entry.reason == "its name is not UTF-8: rename it"
