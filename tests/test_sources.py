"""Public sources: each reader on a tiny generated package in the real format; nothing is downloaded."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from source_packages import CUBE, contents, frames_of, png, put, target_folder, tone

from megamm.data.sources import furniture
from megamm.data.sources.asterisk import read_transcripts, write_asterisk
from megamm.data.sources.bunny import clips, write_bunny
from megamm.data.sources.drawings import write_tuxpaint
from megamm.data.sources.furniture import furniture_caption, read_properties, write_furniture
from megamm.data.sources.games import action_caption, write_pingus, write_wesnoth
from megamm.data.sources.media import write_flac, write_video

# --- the sources ---


def test_prompts_are_decoded_and_remarks_left_out(tmp_path):
    """The coder has a filter, so the tone is compared by its frequency and loudness."""
    sounds = tmp_path / "package/usr/share/asterisk/sounds/en_US_f"
    sounds.mkdir(parents=True)
    (sounds / "digits").mkdir()
    samples = tone(0.5, 16_000, 440)
    with av.open(str(sounds / "digits/1.g722"), mode="w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    lines = "; comment: x\ndigits/1: One:  two.\nbeep: [a tone]\nsilence/1: (silence)\nnot-there: Words.\n"
    put(tmp_path / "package/usr/share/doc/a/core-sounds-en.txt.gz", gzip.compress(lines.encode()))
    french = tmp_path / "package/usr/share/asterisk/sounds/fr_CA_f/digits/1.g722"
    put(french, (sounds / "digits/1.g722").read_bytes())
    put(tmp_path / "package/usr/share/doc/b/core-sounds-fr.txt.gz", gzip.compress(b"digits/1: Un\n"))
    sample, other = write_asterisk(tmp_path / "package", target_folder(tmp_path / "raw"))
    assert contents(sample) == {"audio": "audio/asterisk-en-digits-1.flac", "text": "One: two."}
    assert contents(other) == {"audio": "audio/asterisk-fr-digits-1.flac", "text": "Un"}
    assert other.noun == sample.noun  # a translation stays in its original's split
    decoded, rate = soundfile.read(tmp_path / "raw/audio/asterisk-en-digits-1.flac")
    assert rate == 16_000 and decoded.ndim == 1 and abs(len(decoded) - len(samples)) < 100
    spectrum = np.abs(np.fft.rfft(decoded * np.hanning(len(decoded))))
    assert abs(spectrum.argmax() * rate / len(decoded) - 440) < 4
    assert decoded.std() == pytest.approx(samples.std() / 2**15, rel=0.05)
    assert set(read_transcripts(lines)) == {"digits/1", "not-there"}


CATALOGUE = """# x
name=Toys
license=CC-BY \\u00a9 Ann
name#1=Red cube 10x20\ncategory#1=Toy Box\ncreator#1=Ann\nmodel#1=/m/cube.obj\nicon#1=/m/cube.png
name#2=Cube lamp\nmodel#2=/m/cube.obj
name#3=Broken\nmodel#3=/m/broken.obj
name#10=Blue cube\nmodel#10=/m/blue.obj\nicon#10=/m/no.png
"""


def furniture_package(folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / "toys.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", CATALOGUE.encode("latin-1"))
        archive.writestr("m/cube.obj", CUBE.format(materials="mtllib cube.mtl", material="paint"))
        archive.writestr("m/cube.mtl", "newmtl paint\nKd 1 0 0\nmap_Kd ../../outside.png\n")
        archive.writestr("m/blue.obj", CUBE.format(materials="", material="bluish"))
        archive.writestr("m/broken.obj", "v 0 0 0\n")
        archive.writestr("m/cube.png", png((0, 255, 0, 0), (10, 10)))
        loader = b"\x01\x05<newmtl bluish\nKa 0.1 0.1 0.1\nKd 0.0 0.0 1.0\n\nnewmtl other\nKd 1.0 1.0 1.0\n\x01\x00"
        archive.writestr("com/eteks/sweethome3d/j3d/OBJLoader.class", loader)
    return folder


def test_furniture_becomes_clouds_pictures_and_a_turntable(tmp_path, caplog):
    raw = target_folder(tmp_path / "raw")
    samples = write_furniture(furniture_package(tmp_path / "package"), raw)
    assert "broken.obj skipped" in caplog.text
    red, blue = samples[:5], samples[5:]
    assert [(contents(s)["text"], s.noun) for s in samples] == [("toy box: tall red cube", "cube")] * 5 + [
        ("tall blue cube", "cube")
    ] * 4
    assert ["video" in contents(s) for s in samples] == [True, False, False, False, False, True, False, False, False]
    for sample, colour in ((red[0], (1, 0, 0)), (blue[0], (0, 0, 1))):  # the second with the program's own materials
        points = np.load(raw / contents(sample)["points"])["points"]
        assert points.shape == (4096, 9) and points.dtype == np.float32
        np.testing.assert_allclose(np.ptp(points[:, :3], axis=0), [1, 2, 1], atol=0.01)
        np.testing.assert_allclose(np.abs(points[:, 3:6]).sum(1), 1, atol=1e-6)  # the faces of a box
        np.testing.assert_array_equal(points[:, 6:], np.broadcast_to(np.float32(colour), (4096, 3)))
        turn = frames_of(raw / contents(sample)["video"]).astype(float)
        assert turn.shape == (17, 128, 128, 3)
        assert turn[0, 64, 64].argmax() == np.argmax(colour) and turn[0, 0, 0].min() > 240
        same, quarter, eighth = (np.abs(turn[0] - turn[frame]).mean() for frame in (16, 4, 2))
        assert max(same, quarter) < 3 < eighth  # a full turn, in which the square base looks the same four times
    icon = np.asarray(Image.open(raw / "images" / f"{red[4].key}.png"))
    assert red[4].key.endswith("-icon") and (icon == 255).all() and icon.shape == (10, 10, 3)
    clouds = [np.load(raw / contents(sample)["points"])["points"] for sample in red]
    assert np.array_equal(clouds[0], clouds[4])  # the icon shows the model before turning
    for turns in (1, 2, 3):  # a rotation matrix about the vertical axis, for positions and normals
        sin, cos = np.sin(np.pi / 2 * turns).round(), np.cos(np.pi / 2 * turns).round()
        matrix = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=np.float32)
        for channels in (slice(0, 3), slice(3, 6)):
            np.testing.assert_array_equal(clouds[turns][:, channels], clouds[0][:, channels] @ matrix.T)
        np.testing.assert_array_equal(clouds[turns][:, 6:], clouds[0][:, 6:])
    credits = (raw / "ATTRIBUTION.md").read_text()
    assert "CC-BY © Ann" in credits and "- Ann: red cube" in credits


@pytest.mark.parametrize(
    ("box", "word"),
    [((1, 1.6, 1), "tall"), ((1, 1.4, 0.9), "compact"), ((1, 0.5, 0.7), "low"), ((1, 0.5, 0.4), "long")],
)
def test_proportions_are_the_same_from_every_side(box, word):
    cloud = np.zeros((2, 9), dtype=np.float32)
    cloud[1, :3] = box
    assert [furniture.proportion(furniture.turned(cloud, quarters)) for quarters in range(4)] == [word] * 4


def test_worker_processes_make_the_same_furniture(tmp_path, monkeypatch, caplog):
    package, made = furniture_package(tmp_path / "package"), []
    for number, least in enumerate((1000, 2)):
        monkeypatch.setattr(furniture, "_PIECES_PER_WORKER", least)
        raw = target_folder(tmp_path / f"raw{number}")
        made.append((write_furniture(package, raw), {p.name: p.read_bytes() for p in raw.rglob("*") if p.is_file()}))
        assert "toys.sh3f: m/broken.obj skipped" in caplog.text
        caplog.clear()
    assert made[0] == made[1] and len(made[0][1]) > 12


def test_furniture_lists_are_read_as_java_writes_them():
    text = "# a=b\n!c=d\nname#1 = Caf\\u00e9 = bar\n\nbroken\n"
    assert read_properties(text) == {"name#1": "Café = bar"}
    assert (
        furniture_caption("Bed 140x190") == "bed" and furniture_caption("Double-hung window 2") == "double-hung window"
    )


def test_sprites_become_videos(tmp_path):
    images = tmp_path / "package/usr/share/games/pingus/data/images"
    sheet = Image.new("RGBA", (8, 12), (0, 0, 0, 0))  # a row for each side, two frames of 4 x 6
    sheet.paste((255, 0, 0, 255), (0, 0, 4, 6))
    sheet.paste((0, 0, 255, 255), (4, 0, 8, 6))
    sheet.paste((0, 255, 0, 255), (0, 6, 4, 12))
    sheet.save(put(images / "walker.png", b""))
    cells = '(pingus-sprite (image "{}") (speed 100) (loop {}) (array 2 1) (size 4 6) {})'
    walker = images / "pingus/player0/walker"
    put(walker / "left.sprite", cells.format("/images/walker.png", "#t", ""))
    put(walker / "right.sprite", cells.format("/images/walker.png", "#t", "(position 0 6)"))
    faller = images / "pingus/player0/faller"
    for side in ("left", "right"):
        put(faller / f"{side}.sprite", cells.format("../../../walker.png", "#f", ""))
    put(images / "unnamed.sprite", cells.format("walker.png", "#t", ""))
    raw = target_folder(tmp_path / "raw")
    samples = write_pingus(tmp_path / "package", raw)
    captions = ["a penguin falling", "a penguin walking to the left", "a penguin walking to the right"]
    assert [contents(s)["text"] for s in samples] == captions
    assert [s.noun for s in samples] == ["falling penguin", "penguin walking", "penguin walking"]
    fall, left, right = (frames_of(raw / contents(s)["video"]) for s in samples)
    assert len(fall) == len(left) == 20 and fall.shape[1:] == (126, 126, 3)  # 2 s at 10 Hz, 6 pixels 21-fold
    colours = [clip[:, 60, 60].argmax(1).tolist() for clip in (fall, left)]
    assert colours == [[0] + [2] * 19, [0, 2] * 10]  # one ends, the other repeats
    assert right[0, 60, 60].argmax() == 1 and right[1].min() > 240 and left[0, 0, 0].min() > 240


def test_stamps_have_a_sample_a_spoken_language(tmp_path):
    stamps = tmp_path / "package/usr/share/tuxpaint/stamps/animals"
    put(stamps / "cat.png", png("red"))
    put(stamps / "cat.txt", "A  cat.\nde.utf8=Eine Katze.\nfr.utf8=Un chat.\nel.utf8=\n")
    for name in ("cat_desc.ogg", "cat_desc_de.ogg", "cat_desc_el.ogg"):
        put(stamps / name, f"sound {name}")
    put(stamps / "dog.svg", "<svg/>")
    put(stamps / "dog.txt", "A dog.")
    put(stamps / "lost.txt", "No picture.")
    raw = target_folder(tmp_path / "raw")
    samples = write_tuxpaint(tmp_path / "package", raw)
    assert [(s.noun, contents(s).get("text"), "audio" in contents(s)) for s in samples] == [
        ("cat", "A cat.", True),
        ("cat", "Eine Katze.", True),
        ("dog", "A dog.", False),
    ]
    assert contents(samples[0])["image"] == contents(samples[1])["image"]
    assert (raw / contents(samples[1])["audio"]).read_text() == "sound cat_desc_de.ogg"
    assert all((raw / path).is_file() for s in samples for kind, path in contents(s).items() if kind != "text")


def test_figures_of_a_game_are_described_and_animated(tmp_path):
    core = tmp_path / "package/usr/share/games/wesnoth/1.16/data/core"
    unit = '[unit_type]\nname= _ "{0} Drake"\n  image="units/drakes/{0}.png"\n  description= _ "{1}"\n[/unit_type]\n'
    put(core / "units/a.cfg", unit.format("big", "A drake of which much\nis to be told by those who saw it."))
    put(core / "units/b.cfg", unit.format("big-old", "spear"))
    put(core / "units/c.cfg", "[advancefrom]")
    for name in ("big", "big-old", *(f"big-old-die{n}" for n in range(1, 12)), *(f"big-fly-se-{n}" for n in (1, 2, 3))):
        place = int(name[11:]) if name[11:].isdigit() else 1
        put(core / f"images/units/drakes/{name}.png", png((20 * place, 0, 0, 255), (72, 72)))
    raw = target_folder(tmp_path / "raw")
    described, animated = write_wesnoth(tmp_path / "package", raw)
    told = "big Drake. A drake of which much is to be told by those who saw it."
    assert (described.noun, contents(described)["text"]) == ("drake", told)
    assert (animated.noun, contents(animated)["text"]) == ("drake old", "big-old Drake: death")
    video = frames_of(raw / contents(animated)["video"])
    assert video.shape == (20, 72, 72, 3)  # 11 frames, repeated to 2 s at 10 Hz
    assert (np.diff(video[:11, 36, 36, 0].astype(int)) > 5).all() and video[11, 36, 36, 0] < 60
    assert action_caption("Archer", "-bow-attack-ne") == "Archer: bow attack, facing north-east"


def film(path: Path, colours: list[tuple[int, int, int]], seconds: float, rate: int) -> bytes:
    """Write one plain shot per colour, with a tone that rises one step per shot, MPEG-4 and AAC in MP4."""
    with av.open(str(path), mode="w") as container:
        video = container.add_stream("mpeg4", rate=rate)
        video.width, video.height, video.pix_fmt = 320, 180, "yuv420p"
        audio = container.add_stream("aac", rate=24_000, layout="mono")
        for number, colour in enumerate(colours):
            picture = np.broadcast_to(np.uint8(colour), (180, 320, 3)).copy()
            for _ in range(int(seconds * rate)):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            samples = (tone(seconds, 24_000, 400 * (number + 1)) / 2**15).astype(np.float32)
            for start in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
                frame.sample_rate = 24_000
                container.mux(audio.encode(frame))
        container.mux([*video.encode(None), *audio.encode(None)])
    return path.read_bytes()


def test_a_film_is_cut_into_shots_with_their_sound(tmp_path):
    content = film(tmp_path / "film.mp4", [(200, 20, 20), (20, 20, 200), (20, 200, 20)], seconds=2, rate=8)
    with zipfile.ZipFile(tmp_path / "film.zip", "w") as archive:
        archive.writestr("film.mp4", content)
        archive.writestr("trailer.mp4", content[:100])
    put(tmp_path / "package/docs/film.zip", (tmp_path / "film.zip").read_bytes())
    raw = target_folder(tmp_path / "raw")
    samples = write_bunny(tmp_path / "package", raw)
    assert [s.key for s in samples] == ["bunny-000-0", "bunny-001-0", "bunny-002-0"]
    assert len({s.noun for s in samples}) == 3
    for number, sample in enumerate(samples):
        frames = frames_of(raw / contents(sample)["video"])
        assert frames.shape == (16, 180, 320, 3) and frames.mean((0, 1, 2)).argmax() == (0, 2, 1)[number]
        sound, rate = soundfile.read(raw / contents(sample)["audio"])
        assert rate == 24_000 and abs(len(sound) - 48_000) <= 1024
        middle = sound[12_000:36_000]
        assert abs(np.abs(np.fft.rfft(middle)).argmax() - 400 * (number + 1)) <= 2
    assert "Blender Foundation" in (raw / "ATTRIBUTION.md").read_text()


def test_long_shots_are_cut_into_equal_parts_and_short_ones_left_out():
    lengths = (13, 1, 4)  # seconds at 2 Hz
    frames = [np.full((40, 40, 3), 80 * n, np.uint8) for n, seconds in enumerate(lengths) for _ in range(2 * seconds)]
    found = [(shot, part, first, len(piece)) for shot, part, first, piece in clips(iter(frames), 2)]
    assert found == [(0, 0, 0, 9), (0, 1, 9, 9), (0, 2, 18, 8), (2, 0, 28, 8)]


def test_the_same_frames_and_sound_give_the_same_bytes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 34, 46, 3), dtype=np.uint8)
    digests = set()
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", frames, 8)
        write_flac(tmp_path / f"{name}.flac", tone(0.1, 16_000, 440), 16_000)
        content = (tmp_path / f"{name}.mp4").read_bytes() + (tmp_path / f"{name}.flac").read_bytes()
        digests.add(hashlib.sha256(content).hexdigest())
    assert len(digests) == 1
    with av.open(str(tmp_path / "a.mp4"), mode="r") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("vp9", 8, 5)
    assert frames_of(tmp_path / "a.mp4").shape == frames.shape
    np.testing.assert_array_equal(soundfile.read(tmp_path / "a.flac", dtype="int16")[0], tone(0.1, 16_000, 440))
