"""Sources of text and interleaved pages, each read from a tiny generated package."""

import gzip
from pathlib import Path

import pytest

from megamm.common.errors import UserError
from megamm.data.raw.samples import read_samples, write_samples
from megamm.data.sources.manuals import is_shown, write_gimp, write_gnome
from megamm.data.sources.text import read_synset, write_fortunes, write_gcide, write_wordnet

PAGE = """<page xmlns="http://projectmallard.org/1.0/" xmlns:if="http://projectmallard.org/if/1.0/" id="x">
  <info><desc>Not shown.</desc><title type="sort">Nor this</title></info>
  <title>Take a <em>picture</em></title>
  <!-- nor this -->
  <p>Press <keyseq><key>Ctrl</key><key>P</key></keyseq>, or click
    <media type="image" src="figures/icon.png"><span>the camera</span></media> at the top.</p>
  <if:choose><if:when test="platform:other"><p>Other desktop.</p></if:when>
    <if:when test="!platform:other"><media type="image" src="figures/shot.png"><p>The window</p></media></if:when>
    <if:else><p>Else.</p></if:else></if:choose>
  <p if:test="target:mobile">On a phone.</p>
  <steps><item><p>Open it.</p><p>Then wait.</p></item><item><p>Done.</p></item></steps>
  <media type="image" src="../../../../../secret.png"/><media type="image" src="figures/no.png"/>
  <media type="video" src="figures/clip.ogv"/>
  <section><title>More</title><screen>a
   b</screen><links type="section"/></section>
</page>"""

HTML = """<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" "x.dtd">
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>7. Blur</title></head><body>
<div class="navheader"><p>Next page</p><img src="images/next.png"/></div>
<div class="sect1"><h2 class="title"><a id="x"></a>7.2. Blur a picture</h2>
<div class="figure"><p class="title"><strong>Figure 17.153. Blurred</strong></p>
<div class="figure-contents"><div class="mediaobject"><img src="images/shot.png" alt="x"/>
<div class="caption"><p>After</p></div></div></div></div>
<p>Click <img src="images/button.png" alt="x"/> once.</p>
<ul><li>loose words with <em>stress</em> here
<div class="mediaobject"><img src="images/shot.png"/></div> and after</li></ul><p>{}</p></div></body></html>"""


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def test_mallard_pages_become_interleaved_samples(tmp_path, raw):
    root = tmp_path / "package/usr/share/help/C"
    put(root / "guide/page.page", PAGE)
    put(root / "guide/broken.page", "<page>")
    put(tmp_path / "package/secret.png", b"secret")
    for name in ("shot", "icon"):
        put(root / f"guide/figures/{name}.png", name)
    (sample,) = write_gnome(tmp_path / "package", raw)
    assert (sample.key, sample.noun, sample.ordered) == ("gnome-guide-page", "picture take", True)
    assert [(part.modality, part.content) for part in sample.parts] == [
        ("text", "Take a picture\n\nPress Ctrl+P, or click the camera at the top."),
        ("image", "images/guide-figures-shot.png"),
        ("text", "The window\n\n- Open it.\n\nThen wait.\n\n- Done.\n\nMore\n\na\n   b"),
    ]
    assert [path.name for path in (raw / "images").iterdir()] == ["guide-figures-shot.png"]
    write_samples(raw, [sample])
    assert list(read_samples(raw)) == [sample]


def test_conditions_hold_for_an_ordinary_screen():
    assert is_shown("!platform:gnome-classic") and is_shown("!target:mobile, !platform:gnome-classic")
    assert not is_shown("platform:gnome-classic") and not is_shown("!target:mobile, platform:gnome-classic")


def test_html_pages_become_interleaved_samples(tmp_path, raw):
    root = tmp_path / "package/usr/share/gimp/2.0/help/en"
    put(root / "blur.html", HTML.format("word " * 50))
    put(root / "short.html", HTML.format("word"))
    put(root / "broken.html", "<html>&nbsp;</html>")
    for name in ("shot", "next", "button"):
        put(root / f"images/{name}.png", name)
    (sample,) = write_gimp(tmp_path / "package", raw)
    assert (sample.key, sample.noun, sample.ordered) == ("gimp-blur", "blur picture", True)
    assert [(part.modality, part.content) for part in sample.parts] == [
        ("text", "Blur a picture\n\nBlurred"),
        ("image", "images/images-shot.png"),
        ("text", "After\n\nClick once.\n\n- loose words with stress here"),
        ("image", "images/images-shot.png"),
        ("text", "and after\n\n" + "word " * 49 + "word"),
    ]
    assert [path.name for path in (raw / "images").iterdir()] == ["images-shot.png"]


def test_dictionaries_become_documents_of_some_entries(tmp_path, raw, monkeypatch):
    monkeypatch.setattr("megamm.data.sources.text.DOCUMENT", 60)
    licence = "  1 This software is provided | as is\n"
    synset = '0000174{0} 03 n 02 {1}_thing 0 {1}(p) 0 001 ~ 00001930 n 0000 | what is {1}; "a {1} | b"  \n'
    lines = licence + "".join(synset.format(n, word) for n, word in enumerate(("red", "big", "odd")))
    for ending in ("adj", "adv", "noun", "verb"):
        put(tmp_path / f"package/usr/share/wordnet/data.{ending}", lines if ending == "noun" else licence)
    first, second = write_wordnet(tmp_path / "package", raw)
    assert first.parts[0].content == (
        'red thing, red (noun): what is red; "a red | b"\nbig thing, big (noun): what is big; "a big | b"'
    )
    assert (second.noun, second.parts[0].content[:9]) == ("odd thing", "odd thing")
    assert read_synset(licence, "noun") is None
    text = (
        "00-database-info\n   About.\nBegin file 1\n\nCat \\Cat\\ (k[a^]t), n.\n   1. A pet.\n      [1913 Webster]\n\n"
    )
    text += '   Note: Purrs.\nDog-fish \\Dog"-fish\\, n.\n   A fish.\n'
    put(tmp_path / "package/usr/share/dictd/gcide.dict.dz", gzip.compress(text.encode()))
    (entries,) = write_gcide(tmp_path / "package", raw)
    assert entries.noun == "cat"
    assert entries.parts[0].content == (
        'Cat \\Cat\\ (k[a^]t), n.\n   1. A pet.\n\n   Note: Purrs.\n\nDog-fish \\Dog"-fish\\, n.\n   A fish.'
    )


def test_sayings_are_single_documents(tmp_path, raw):
    folder = tmp_path / "package/usr/share/games/fortunes"
    put(folder / "wisdom", "Look before you leap.\n\t-- Aesop\n%\n%\nOne % of it.\n%\n")
    put(folder / "ethnic", "left out\n%\n")
    put(folder / "wisdom.dat", b"\x00\x01")
    (folder / "wisdom.u8").symlink_to("wisdom")
    samples = write_fortunes(tmp_path / "package", raw)
    assert [(s.key, s.parts[0].content) for s in samples] == [
        ("fortunes-wisdom-0001", "Look before you leap.\n\t-- Aesop"),
        ("fortunes-wisdom-0003", "One % of it."),
    ]


def test_a_package_of_another_form_is_named(tmp_path, raw):
    for write in (write_gnome, write_gimp, write_wordnet, write_gcide, write_fortunes):
        with pytest.raises(UserError, match="package"):
            write(tmp_path / "empty", raw)
