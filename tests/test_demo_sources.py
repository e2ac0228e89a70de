"""The demo's sources on tiny generated packages: captions of attributes, copies that differ, orders of digits."""

import gzip
import io
import zipfile

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from source_packages import CUBE, contents, frames_of, png, put, target_folder, tone

from megamm.data.sources import asterisk, things
from megamm.data.sources.emoji import SIDE, on_white, variant_caption
from megamm.data.sources.things import about_vertical, painted


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        (":woman_farmer_dark_skin_tone:", "dark skin, woman, farmer"),
        (":man_judge:", "yellow skin, man, judge"),
        (":woman_in_tuxedo_light_skin_tone:", "light skin, woman, in tuxedo"),
        (":woman_light_skin_tone_red_hair:", "light skin, woman, red hair"),
        (":thumbs_up_dark_skin_tone:", "dark skin, thumbs up"),
        (":victory_hand:", "yellow skin, victory hand"),
        (":woman_farmer_medium-dark_skin_tone:", None),
        (":woman_and_man_holding_hands_dark_skin_tone:", None),
        (":farmer:", None),
        (":red_heart:", None),
    ],
)
def test_variants_are_spelled_out_in_a_fixed_order(name, caption):
    assert variant_caption(name) == caption


def test_a_picture_is_put_on_white_as_large_as_it_fits():
    given = png((255, 0, 0, 255), (34, 32))
    drawn = np.asarray(Image.open(io.BytesIO(on_white(given))))
    assert drawn.shape == (SIDE, SIDE, 3)
    down, across = np.nonzero(drawn[..., 1] < 128)
    assert (across.min(), across.max()) == (0, SIDE - 1)
    assert (down.min(), down.max()) == (2, SIDE - 3)  # 68 of 72 rows
    clear = np.asarray(Image.open(io.BytesIO(on_white(png((255, 0, 0, 0), (32, 32))))))
    assert (clear == 255).all()


def test_copies_are_shifted_and_mirrored():
    picture = np.zeros((32, 32, 4), dtype=np.uint8)
    picture[:, :16] = (255, 0, 0, 255)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    copies = [
        np.asarray(Image.open(io.BytesIO(on_white(file.getvalue(), *copy))))
        for copy in ((0, 0, False), (5, 3, False), (0, 0, True))
    ]
    assert np.array_equal(copies[1][3:, 5:], copies[0][:-3, :-5]) and (copies[1][:3] == 255).all()
    assert np.array_equal(copies[2], copies[0][:, ::-1]) and not np.array_equal(copies[2], copies[0])


def write_g722(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), mode="w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])


def test_sequences_are_the_single_recordings_in_new_orders(tmp_path, monkeypatch):
    monkeypatch.setattr(asterisk, "SEQUENCES", 5)
    words = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
    package = tmp_path / "package"
    silence = np.zeros(4000, dtype=np.int16)
    for digit in range(10):
        recording = np.concatenate([silence, tone(0.2, 16_000, 300 + 100 * digit), silence])
        write_g722(package / f"usr/share/asterisk/sounds/en_US_f/digits/{digit}.g722", recording)
    lines = "".join(f"digits/{d}: {word.title()}\n" for d, word in enumerate(words))
    put(package / "usr/share/doc/a/core-sounds-en.txt.gz", gzip.compress(lines.encode()))
    samples = asterisk.write_digits(package, target_folder(tmp_path / "raw"))
    assert len(samples) == 5 * asterisk.COPIES and len({contents(s)["text"] for s in samples}) == 5
    assert {s.noun for s in samples} == {"digits en"}  # so that only combinations are held out
    beat = round(asterisk.BEAT * 16_000)
    for sample in samples:
        said = [words.index(word) for word in contents(sample)["text"].split()]
        assert sample.key.startswith("digits-en-" + "".join(map(str, said)) + "-")
        heard, rate = soundfile.read(tmp_path / "raw" / contents(sample)["audio"])
        assert rate == 16_000 and len(heard) % beat == 0
        loud = np.abs(heard).reshape(-1, beat).max(1) > 0.05  # beats of tone: two runs, each starting on a beat
        starts = np.flatnonzero(np.diff(np.concatenate([[False], loud]).astype(int)) == 1)
        pitches = []
        for start in starts:
            window = heard[start * beat + 800 : start * beat + 2400]
            pitches.append(np.abs(np.fft.rfft(window * np.hanning(1600))).argmax() * 10)
        # Two recordings without a pause form one run; only the first pitch is checked.
        assert round((pitches[0] - 300) / 100) == said[0] and len(starts) <= 2


def test_silence_is_trimmed_and_pauses_are_whole_beats():
    beat = round(asterisk.BEAT * asterisk.SAMPLE_RATE)
    recording = np.concatenate([np.zeros(5000), np.full(1000, 9000), np.zeros(3000)]).astype(np.int16)
    edge = round(0.02 * asterisk.SAMPLE_RATE)
    assert len(asterisk.trimmed(recording)) == 1000 + 2 * edge
    whole = asterisk.joined([np.ones(10, np.int16), np.ones(beat, np.int16), np.ones(1, np.int16)], [2, 0])
    assert np.flatnonzero(np.diff(np.concatenate([[0], whole])) == 1).tolist() == [0, 3 * beat]
    assert len(whole) == 5 * beat and whole[4 * beat] == 1 and whole[4 * beat + 1] == 0


def things_package(folder):
    names = ("name#1=Sofa\nmodel#1=/m/sofa.obj\n", "name#2=Boat\nmodel#2=/m/boat.obj\n")
    folder.mkdir()
    with zipfile.ZipFile(folder / "program.jar", "w") as archive:
        archive.writestr("io/DefaultFurnitureCatalog.properties", "".join(names))
        for name in ("sofa", "boat"):
            archive.writestr(f"m/{name}.obj", CUBE.format(materials="mtllib a.mtl", material="paint"))
        archive.writestr("m/a.mtl", "newmtl paint\nKd 1 0 0\n")
    return folder


def test_things_are_painted_and_turn(tmp_path):
    raw = target_folder(tmp_path / "raw")
    (raw / "ATTRIBUTION.md").write_text("")
    samples = things.write_things(things_package(tmp_path / "package"), raw)
    assert {s.noun for s in samples} == {"sofa"}  # there is no boat in the list of things
    videos = [s for s in samples if "video" in contents(s)]
    stills = [s for s in samples if "video" not in contents(s)]
    captions = [contents(s)["text"] for s in stills]
    copies = len(things.SEEN_COPIES) + len(things.CLOUD_COPIES)
    assert set(captions) == {f"{colour}, sofa" for colour in things.COLOURS}
    assert {captions.count(caption) for caption in captions} == {copies}
    kinds = [tuple(kind in contents(s) for kind in ("points", "image")) for s in stills[:copies]]
    assert all(kinds.count(kind) >= 2 for kind in ((True, True), (True, False), (False, True)))
    pictures = [np.asarray(Image.open(raw / contents(s)["image"])) for s in stills[:2]]
    assert pictures[0].shape == (things.PICTURE, things.PICTURE, 3) and not np.array_equal(pictures[0], pictures[1])
    for s in stills:
        strongest = {"red": [0], "green": [1], "blue": [2], "yellow": [0, 1]}[contents(s)["text"].split(",")[0]]
        if "points" in contents(s):
            with np.load(raw / contents(s)["points"]) as file:
                colour = file["points"][:, 6:].mean(0)
            assert min(colour[strongest]) > 1.5 * max(np.delete(colour, strongest))
    by_caption = {contents(s)["text"]: frames_of(raw / contents(s)["video"]).astype(float) for s in videos}
    assert len(by_caption) == len(videos) == 2 * len(things.COLOURS)
    left, right = (by_caption[f"turning {direction}, red, sofa"] for direction in ("left", "right"))
    assert left.shape == (things.FRAMES, things.PICTURE, things.PICTURE, 3)
    assert np.abs(left[0] - right[0]).mean() < 1 < np.abs(left[1] - right[1]).mean()  # they begin the same


def test_a_cloud_is_turned_as_the_renderer_turns_it_and_painted_as_bright_as_it_was():
    cloud = np.array([[1, 2, 3, 0, 0, 1, 0.5, 0.5, 0.5], [0, 0, 0, 0, 1, 0, 1, 1, 1]], dtype=np.float32)
    np.testing.assert_allclose(about_vertical(cloud, 90)[0, :6], [3, 2, -1, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(about_vertical(about_vertical(cloud, 45), 315), cloud, atol=1e-6)
    red = painted(cloud, "red")
    np.testing.assert_array_equal(red[:, :6], cloud[:, :6])
    np.testing.assert_allclose(red[:, 6:], np.outer([0.7, 1.0], things.COLOURS["red"]), atol=1e-6)
