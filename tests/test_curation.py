"""The curation rules against brute force, known values, and samples made for each rule."""

import io
import random
import re
import time

import numpy as np
import pytest
import soundfile
from audio_data import as_bytes, as_mpeg4, chirp
from PIL import Image

from megamm.common.errors import UserError
from megamm.data.build.curation import (
    RULES,
    CurationOptions,
    FilteredOut,
    NearDuplicates,
    check_audio,
    check_image,
    check_text,
    is_card,
    mask,
    shingles,
    signature,
)
from megamm.media.sound_length import _ogg_checksum

RATE = 16000


def reason(check, data, *kind, **options):
    """Return why the rule drops this sample; None if it keeps it."""
    try:
        check(data, *kind, CurationOptions(**options))
    except FilteredOut as error:
        assert error.rule in RULES
        return f"{error.rule}: {error}"
    return None


def image(size, fill=(9, 9, 9), dot=(250, 0, 0), mode="RGB"):
    picture = Image.new(mode, size, fill)
    if dot is not None:
        picture.putpixel((0, 0), dot)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def audio(samples, kind="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples, dtype=np.float32), RATE, format=kind, subtype=subtype)
    return file.getvalue()


def tone(seconds=0.5, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * 441.7 * np.arange(int(seconds * RATE)) / RATE)


def test_images():
    assert reason(check_image, image((8, 160)), "png") is None
    assert "7 x 9 is less than 8" in reason(check_image, image((7, 9)), "png")
    assert "8 x 161 is more than 20 : 1" in reason(check_image, image((8, 161)), "png")
    assert reason(check_image, image((161, 8)), "png", max_aspect=30) is None
    assert "blank" in reason(check_image, image((9, 9), dot=None), "png")
    assert "blank" in reason(check_image, image((9, 9), fill=(0, 0, 0, 0), dot=(9, 9, 9, 0), mode="RGBA"), "png")
    assert reason(check_image, image((9, 9), fill=(0, 0, 0, 0), dot=(0, 0, 0, 255), mode="RGBA"), "png") is None
    assert reason(check_image, image((9, 9), dot=None), "png", keep_blank=True) is None


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_audio(kind):
    assert reason(check_audio, audio(tone(), kind), kind.lower()) is None
    assert "0.05 s, not 0.1 to 1800 s" in reason(check_audio, audio(tone(0.05), kind), kind.lower())
    assert "0.50 s, not" in reason(check_audio, audio(tone(0.5), kind), kind.lower(), max_seconds=0.4)
    assert "silent" in reason(check_audio, audio(tone(0.5, 5e-4), kind), kind.lower())
    assert reason(check_audio, audio(0 * tone(), kind), kind.lower(), keep_blank=True) is None


def test_audio_is_measured_as_training_reads_it():
    """Lengths that a header does not have, or that libsndfile misreads: those of the samples written."""
    sound = chirp(1, seconds=2.0)
    wav, opus = as_bytes(sound, "wav"), as_bytes(sound, "opus")
    # The last page without its flag 4, with the checksum of that.
    page = bytearray(opus[opus.rfind(b"OggS") :])
    page[5] &= ~4
    page[22:26] = _ogg_checksum(bytes(page[:22] + bytes(4) + page[26:])).to_bytes(4, "little")
    sounds = {
        "a wav from a pipe": (wav[:4] + b"\xff" * 4 + wav[8:40] + b"\xff" * 4 + wav[44:], "wav", 2.0),
        "chained oggs": (2 * as_bytes(sound, "ogg"), "ogg", 4.0),
        "flacs behind each other": (2 * as_bytes(sound, "flac"), "flac", 4.0),
        "opus without its end flag": (opus[: -len(page)] + page, "opus", 2.0),
        "m4a": (as_mpeg4(sound, "m4a"), "m4a", 2.0),
        "aac": (as_mpeg4(sound, "aac"), "aac", 2.0),
    }
    for what, (data, extension, seconds) in sounds.items():
        assert reason(check_audio, data, extension, max_seconds=seconds + 0.2) is None, what
        assert " s, not 0.1 to" in reason(check_audio, data, extension, max_seconds=seconds - 0.1), what


def test_clipped_audio():
    """A sine of amplitude a is clipped at full scale in a share of 1 - 2/pi asin(1/a)."""
    for amplitude in (1.005, 1.02, 3.0):
        share = 1 - 2 / np.pi * np.arcsin(0.999 / amplitude)
        data = audio(np.clip(tone(2, amplitude), -1, 1), subtype="FLOAT")
        assert reason(check_audio, data, "wav", max_clipped=share * 1.05) is None
        assert "clipped" in reason(check_audio, data, "wav", max_clipped=share * 0.95)
    assert "cannot be checked" in reason(check_audio, b"RIFF", "wav")


ENGLISH = (
    "the old house stood on a hill above the village and no one had lived there since the war ended many years ago"
)
GERMAN = "das alte Haus stand auf einem Hügel über dem Dorf und keiner wohnte dort seit der Krieg vor Jahren endete"


def test_text_length_and_language():
    assert reason(check_text, "ab", min_characters=2, max_characters=2) is None
    assert "2 characters, not 3 to 4" in reason(check_text, "ab", min_characters=3, max_characters=4)
    assert reason(check_text, ENGLISH, languages=("en", "fr")) is None and reason(check_text, GERMAN) is None
    assert reason(check_text, GERMAN, languages=("en",)) == "language: language de, not en"
    assert reason(check_text, " ".join(GERMAN.split()[:19]), languages=("en",)) is None  # too short to decide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"near_duplicates": 1.5}, "from 0 to 1"),
        ({"max_clipped": -1}, "from 0 to 1"),
        ({"min_characters": 5, "max_characters": 4}, "min_characters"),
        ({"min_seconds": -1}, "min_seconds"),
        ({"min_side": 0}, "at least 1"),
        ({"languages": ("eng",)}, "unknown language 'eng'; did you mean 'en'"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(UserError, match=message):
        CurationOptions(**options)


def jaccard(first, second):
    a, b = (set(shingles(re.findall(r"\w+", text))) for text in (first, second))
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_of_brute_force():
    """Every pair above the threshold by the exact Jaccard similarity is found, and none far below it."""
    rng = random.Random(1)
    words = [f"w{number}" for number in range(500)]
    texts = []
    for _ in range(15):
        base = [rng.choice(words) for _ in range(rng.randrange(60, 400))]
        for changes in (0, 1, 3, 8, 30):
            copy = list(base)
            for _ in range(changes):
                copy[rng.randrange(len(copy))] = rng.choice(words)
            texts.append(" ".join(copy))
    found = NearDuplicates(0.8)
    missed = wrong = close = 0
    for number, text in enumerate(texts):
        near = found.find(signature(text))
        exact = {str(other): jaccard(text, texts[other]) for other in range(number)}
        best = max(exact.values(), default=0)
        close += best > 0.85
        missed += best > 0.85 and near is None
        wrong += best < 0.7 and near is not None
        if near is not None:
            assert abs(near[1] - exact[near[0]]) < 0.15  # 4 standard deviations with 128 permutations are 0.14
        found.add(str(number), signature(text))
    assert close > 15 and missed <= 1 and wrong == 0


def test_short_texts_have_no_signature():
    assert signature(" ".join(["word"] * 49)) is None
    assert signature(" ".join(["word"] * 50)).shape == (128,)
    assert (signature(ENGLISH * 3) == signature(ENGLISH.upper() * 3)).all()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail john.doe+x@mail.example.co.uk, now", "mail <EMAIL>, now"),
        ("a@b is not an address, nor is @name or x @ y.z", None),
        ("host 192.168.0.1. Port 8080", "host <IP>. Port 8080"),
        ("version 1.2.3, 300.1.2.3 and 1.2.3.4.5", None),
        ("from 2001:db8::8a2e:370:7334 to fe80:1:2:3:4:5:6:7", "from <IP> to <IP>"),
        ("std::vector a::b 12:30:45 ::", None),
        ("card 4111 1111 1111 1111 or 5500-0000-0000-0004.", "card <CARD> or <CARD>."),
        ("4111 1111 1111 1112 fails Luhn, 0000 0000 0000 0000 is none", None),
        (
            "call +49 30 1234567, +1 (555) 123-4567 or (555) 123-4567 or 555.123.4567",
            "call <PHONE>, <PHONE> or <PHONE> or <PHONE>",
        ),
        ("in 2024 - 2026, 3 + 4 = 7, 1,000,000 and 10-20-30", None),
        ("x@y.org 4111111111111111 +441632960961 10.0.0.1", "<EMAIL> <CARD> <PHONE> <IP>"),
    ],
)
def test_personal_data_is_masked(text, masked):
    found, counts = mask(text)
    assert found == (text if masked is None else masked)
    assert sum(counts.values()) == found.count("<")
    assert mask(found) == (found, {})


def test_luhn_against_its_definition():
    """One wrong digit is always detected; every tenth random number is valid."""
    rng = random.Random(0)
    valid = sum(is_card("".join(rng.choices("0123456789", k=16))) for _ in range(5000))
    assert 400 < valid < 600
    for position in range(16):
        digits = list("4111111111111111")
        digits[position] = str((int(digits[position]) + 1 + rng.randrange(9)) % 10)
        assert is_card("".join(digits)) == (digits == list("4111111111111111"))


@pytest.mark.parametrize("piece", ["1", "1.", "1 ", "a@", "a.", "+1 ", "(555) ", "a:", "::", "@a.", "-"])
def test_no_text_takes_long_to_mask(piece):
    start = time.monotonic()
    mask(piece * 100_000)
    assert time.monotonic() - start < 5
