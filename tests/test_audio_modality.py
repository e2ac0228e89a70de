"""Audio: rejected files, sample preparation, and the modality's contract with a real (untrained) codec."""

import io
import struct

import numpy as np
import pytest
import scipy
import soundfile
import torch
from audio_data import FORMATS, RATE, as_bytes, chirp

from megamm.common.errors import UnreadableMedia, UserError
from megamm.media import sound_file
from megamm.media.sound_file import check_sound, read_waveform, resample
from megamm.modalities.audio import AudioModality
from megamm.tokenizers.audio.model import AudioCodec, AudioCodecConfig
from megamm.tokenizers.io import save_codec

SOUND = chirp(1, seconds=3.0)
FILES = {extension: as_bytes(SOUND, extension) for extension in FORMATS}
WAV = FILES["wav"]


def float_wav(samples, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples, dtype=np.float32), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def one(value, at=5000):
    samples = SOUND.copy()
    samples[at] = value
    return float_wav(samples)


def damaged(data):
    """Return a file with zeros in the middle, which a checksum detects."""
    middle = len(data) // 2
    return data[:middle] + bytes(40) + data[middle + 40 :]


def claiming(data, samples):
    """Return a FLAC file whose header claims this many samples (36 bits, from the low half of byte 21)."""
    first = (data[21] & 0xF0) | samples >> 32
    return data[:21] + bytes([first]) + struct.pack(">I", samples & 0xFFFFFFFF) + data[26:]


BAD = {
    "zero bytes": (b"", "wav", "zero bytes"),
    "text named flac": (b"not a sound\n" * 50, "flac", "not a sound file"),
    "html named mp3": (b"<html>404 not found</html>" * 9, "mp3", "not a sound file"),
    "wav named flac": (WAV, "flac", "a WAV .PCM_16. file with the extension .flac"),
    "vorbis named opus": (FILES["ogg"], "opus", "a OGG .VORBIS. file with the extension .opus"),
    "unknown ending": (WAV, "aiff", "'aiff' is not one of"),
    "wav header alone": (WAV[:44], "wav", "truncated"),
    "truncated wav": (WAV[: len(WAV) // 2], "wav", "truncated"),
    "wav without its last samples": (WAV[:-10], "wav", "truncated"),
    "truncated flac": (FILES["flac"][: len(FILES["flac"]) // 2], "flac", "broken FLAC"),
    "truncated ogg": (FILES["ogg"][: len(FILES["ogg"]) // 2], "ogg", "truncated"),
    "ogg without its end": (FILES["ogg"][:-10], "ogg", "truncated"),
    "ogg without its only page of sound": (FILES["ogg"][: FILES["ogg"].rfind(b"OggS")], "ogg", "shorter than"),
    "opus without its end": (FILES["opus"][:-10], "opus", "truncated"),
    "truncated mp3": (FILES["mp3"][: len(FILES["mp3"]) // 2], "mp3", "truncated"),
    "damaged flac": (damaged(FILES["flac"]), "flac", "broken FLAC"),
    "NaN": (one(np.nan), "wav", "NaN or Inf"),
    "infinity": (one(-np.inf), "wav", "NaN or Inf"),
    "integers as floats": (float_wav(SOUND * 32768), "wav", "samples above"),
    "silence": (as_bytes(np.zeros(RATE)), "flac", "silence"),
    "a constant": (as_bytes(np.full(RATE, 0.25)), "flac", "silence"),
    "channels that cancel": (as_bytes(np.stack([SOUND, -SOUND], 1)), "flac", "silence"),
    "too short": (as_bytes(SOUND[: RATE // 20 - 1]), "flac", "shorter than"),
    "no samples": (as_bytes(SOUND[:0], "wav"), "wav", "shorter than"),
    "years of sound": (claiming(FILES["flac"], 2**36 - 1), "flac", "longer than 120 minutes"),
    "a rate of 1 Hz": (as_bytes(SOUND, "wav", rate=1), "wav", "longer than|sample rate of 1 Hz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sounds_are_refused_with_the_reason(name):
    data, extension, reason = BAD[name]
    with pytest.raises(UnreadableMedia, match=reason):
        AudioModality.check_media(data, extension)
    if "silence" not in reason:  # inaudible sound is still read
        with pytest.raises(UnreadableMedia, match=reason):
            read_waveform(data, extension, RATE, 60.0)


@pytest.mark.parametrize("extension", FORMATS)
def test_good_sounds_are_accepted_and_read(extension):
    AudioModality.check_media(FILES[extension], extension)
    read = read_waveform(FILES[extension], extension, RATE, 60.0)
    assert read.dtype == np.float32 and abs(len(read) - len(SOUND)) <= 1152
    if extension in ("flac", "wav"):
        assert np.abs(read - SOUND).max() <= 2**-15  # rounded to 16 bits
    else:
        best = np.abs(scipy.signal.correlate(read, SOUND)).max()
        assert best > 0.9 * np.linalg.norm(read) * np.linalg.norm(SOUND)


def test_a_wav_written_to_a_pipe_is_accepted():
    piped = WAV[:4] + b"\xff\xff\xff\xff" + WAV[8:]
    assert check_sound(piped, "wav") == check_sound(WAV, "wav")


def test_the_digest_is_of_the_samples_and_not_of_the_file():
    samples = (SOUND * 2**15).astype(np.int16)  # libsndfile rounds floats differently for each format
    digests = [check_sound(as_bytes(samples, extension), extension) for extension in ("flac", "wav")]
    assert digests[0] == digests[1] and len(digests[0]) == 64
    assert check_sound(as_bytes(samples, rate=RATE + 1), "flac") != digests[0]
    samples[100] += 1
    assert check_sound(as_bytes(samples), "flac") != digests[0]


def test_a_file_is_read_only_as_far_as_needed(monkeypatch):
    monkeypatch.setattr(sound_file, "BLOCK", 1000)
    broken_later = damaged(as_bytes(chirp(2, seconds=4.0)))
    early = read_waveform(broken_later, "flac", RATE, 0.5)
    assert np.abs(early - chirp(2, seconds=4.0)[: RATE // 2]).max() <= 2**-15
    with pytest.raises(UnreadableMedia):
        read_waveform(broken_later, "flac", RATE, 4.0)


def test_channels_are_averaged():
    both = np.stack([SOUND, 0.5 * SOUND[::-1]], 1)
    assert np.abs(read_waveform(float_wav(both), "wav", RATE, 9.0) - both.mean(axis=1)).max() < 1e-7


def test_samples_beyond_full_scale_are_clipped():
    assert np.abs(read_waveform(float_wav(4 * SOUND), "wav", RATE, 9.0)).max() == 1.0


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_what_fits_and_drops_the_rest(rate):
    """A tone below both Nyquist limits stays the same; one above the new limit is removed (closed forms)."""
    time, new_time = np.arange(rate) / rate, np.arange(RATE) / RATE
    tone = resample(np.sin(2 * np.pi * 1234 * time).astype(np.float32), rate, RATE)
    inner = slice(RATE // 20, -RATE // 20)
    assert len(tone) == RATE and np.abs(tone - np.sin(2 * np.pi * 1234 * new_time))[inner].max() < 5e-3
    if rate > 2 * RATE:
        assert np.abs(resample(np.sin(2 * np.pi * 10_000 * time).astype(np.float32), rate, RATE))[inner].max() < 5e-3


def test_resampling_agrees_with_the_fourier_method():
    """Resampling agrees on a band-limited periodic signal, for which scipy.signal.resample is exact."""
    spectrum = np.zeros(22_051, dtype=complex)
    spectrum[50:4000] = np.random.default_rng(0).standard_normal(3950)
    waveform = np.fft.irfft(spectrum)
    waveform = (waveform / np.abs(waveform).max()).astype(np.float32)
    ours, exact = resample(waveform, 44_100, RATE), scipy.signal.resample(waveform, RATE)
    inner = slice(500, -500)
    assert np.linalg.norm((ours - exact)[inner]) < 0.01 * np.linalg.norm(exact[inner])


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    config = AudioCodecConfig(mels=20, codebooks=3, levels=(5, 4, 3), width=16, decoder_depth=1, max_seconds=2.0)
    save_codec(AudioCodec(config), folder)
    return AudioModality.load(folder)


def test_media_to_ids_and_back_through_the_protocol(audio):
    media = [audio.read_media(as_bytes(chirp(n, seconds), rate=22_050), "flac") for n, seconds in enumerate((0.3, 1.7))]
    together, alone = audio.encode(media), [audio.encode([m])[0] for m in media]
    assert audio.encode([]) == [] and (audio.vocabulary_size, audio.stride, audio.tokens_per_item) == (180, 3, None)
    for waveform, ids, other in zip(media, together, alone, strict=True):
        assert ids.dtype == np.int64 and len(ids) == 3 * -(-len(waveform) // 800)
        assert np.array_equal(ids, other)  # batching does not change the ids
        assert all(id in audio.valid_token_ids(place) for place, id in enumerate(ids.tolist()))
        decoded = audio.decode(ids)
        assert decoded.dtype == np.float32 and len(decoded) == len(ids) // 3 * 800
    written = audio.read_media(audio.write_media(SOUND), "flac")
    assert np.abs(written - SOUND[: 2 * RATE]).max() <= 2**-16 and len(written) == 2 * RATE  # max_seconds
    assert np.array_equal(audio.read_media(audio.write_media(written), "flac"), written)


def test_what_is_too_loud_is_clipped_when_written(audio):
    written = audio.read_media(audio.write_media(np.array([2.0, -2.0] * 500, dtype=np.float32)), "flac")
    assert written[:2].tolist() == [1 - 2**-15, -1.0]


def test_positions_are_latent_frame_and_level(audio):
    assert audio.positions(7).T.tolist() == [[t, h, 0] for t in range(3) for h in range(3)][:7]


def test_choices_are_the_ids_of_a_level(audio):
    assert [audio.valid_token_ids(place) for place in (0, 1, 2, 3)] == [
        range(60),
        range(60, 120),
        range(120, 180),
        range(60),
    ]


@pytest.mark.parametrize("ids", [[], [0, 60], [0, 60, 120, 0], [60, 0, 120], [0, 60, 180], [-1, 60, 120]])
def test_ids_that_are_no_sound_are_refused(audio, ids):
    with pytest.raises(ValueError, match="ids"):
        audio.decode(np.array(ids, dtype=np.int64))


def test_no_codec_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a tokenizer for audio"):
        AudioModality.load(tmp_path)
