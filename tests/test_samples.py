"""samples.jsonl: every form of a line read and written back, unusable lines named, paths kept inside the folder."""

import json
import re
from pathlib import Path

import pytest

from megamm.common.errors import UserError
from megamm.data.raw.samples import (
    FILE,
    Broken,
    RawPart,
    RawSample,
    clean_caption,
    clean_text,
    fit_key,
    normalise_noun,
    read_samples,
    sample_of,
    write_samples,
)
from megamm.modalities import REGISTRY
from megamm.modalities.text import TextModality
from megamm.shards.folder import KEY

PAGE = {"parts": [{"text": "Cats\nare small."}, {"image": "a.png"}, {"text": "They sleep."}], "key": "page"}


def read(folder, *lines):
    (folder / FILE).write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return list(read_samples(folder))


def test_every_form_of_a_line(tmp_path):
    folder = tmp_path / "my own"
    folder.mkdir()
    pair, speech, page, lone = read(
        folder,
        {"image": "images/a.png", "caption": " a  red\tcat "},
        "",
        {"text": "two\r\n\r\n\r\n  lines ", "image": "b.png", "key": "k", "noun": "other"},
        PAGE,
        {"image": "c.png", "width": 3},
    )
    assert pair == RawSample("my-own-00000001", "cat", (RawPart("text", "a red cat"), RawPart("image", "images/a.png")))
    assert (speech.key, speech.noun, speech.parts[0].content) == ("k", "other", "two\n\n  lines")
    assert page.ordered and [p.modality for p in page.parts] == ["text", "image", "text"] and page.noun == "cat"
    assert (lone.noun, lone.ignored) == (lone.key, ("width",))


def test_written_samples_are_read_back(tmp_path):
    samples = [
        RawSample("one", "cat", (RawPart("text", "a café\n  twice"), RawPart("image", "ä.png"))),
        RawSample("two", "dog", (RawPart("image", "b.png"),)),
        RawSample("page", "fox", (RawPart("image", "b.png"), RawPart("text", "x"), RawPart("text", "y")), ordered=True),
    ]
    write_samples(tmp_path, samples)
    assert list(read_samples(tmp_path)) == samples


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no json", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("[]", "not a JSON object"),
        ({"caption": "x", "text": "y"}, 'both "caption" and "text"'),
        ({"image": "a.png", "caption": " \t"}, 'no "caption"'),
        ({"image": 3, "caption": "x"}, 'no "image"'),
        ({"key": "k"}, "no parts"),
        ({"key": "a.b", "caption": "x"}, "invalid key 'a.b'"),
        ({"caption": "\ud800"}, "surrogate"),
        ({"parts": []}, '"parts" is not'),
        ({"parts": [{"text": "x"}, {"image": "a.png", "text": "y"}]}, "part 1 is not"),
        ({"parts": [{"smell": "x"}]}, "part 0 is not"),
        ({"image": "../secret.png"}, "leads outside the folder"),
        ({"image": "/etc/hostname"}, "leads outside the folder"),
        ({"image": "inside/../../secret.png"}, "leads outside the folder"),
        ({"image": "link.png"}, "leads outside the folder"),
        ({"image": "loop"}, "leads outside the folder"),
        ({"image": "a\0.png"}, "leads outside the folder"),
        ({"parts": [{"text": "x"}, {"image": "link.png"}]}, "leads outside the folder"),
    ],
)
def test_unusable_lines_are_named(tmp_path, line, reason):
    folder = tmp_path / "raw"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop").symlink_to("loop")
    good, broken = read(folder, {"caption": "fine"}, line)
    assert isinstance(good, RawSample) and isinstance(broken, Broken)
    assert broken.what == f"{FILE}:2" and reason in broken.reason


def test_a_folder_without_samples_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no samples\.jsonl.*write one line per sample"):
        list(read_samples(tmp_path))


def test_texts_are_cleaned():
    assert clean_caption(" a\t cafe\u0301\n\x07 ") == "a café"
    assert clean_text("\n\n a\r\n\tb \n\n\n\nc\x07d\n") == " a\n\tb\n\nc d"
    assert "\0" in clean_caption("a\0b") and "\0" in clean_text("a\0b")  # kept, so that the build rejects it by name


def test_any_name_gives_a_fit_key():
    names = ["cat", "a/b", "a b", "a-b", "ä", "日本", "x" * 200, "x" * 201, "", "-", "../../etc/passwd"]
    keys = [fit_key(name) for name in names]
    assert all(KEY.fullmatch(key) for key in keys) and len(set(keys)) == len(names)
    assert keys[0] == "cat" and keys[3] == "a-b" and keys[1].startswith("a-b-")


def test_the_noun_of_a_page_is_its_first_line(tmp_path):
    (page,) = read(tmp_path, {"parts": [{"image": "a.png"}, {"text": "Red Foxes\nand other animals"}]})
    assert page.noun == normalise_noun("Red Foxes") == "fox"


def test_the_examples_of_the_manual_are_samples(monkeypatch):
    """Every line of JSON in docs/data.md is valid once its modalities are registered."""
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    lines = [line for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for modality in ("audio", "video", "points"):
        if modality not in REGISTRY:
            monkeypatch.setitem(REGISTRY, modality, TextModality)
    samples = [sample_of(json.loads(line), "key") for line in lines]
    assert [sample.ordered for sample in samples] == [False] * 5 + [True]
    assert not any(sample.ignored for sample in samples)
