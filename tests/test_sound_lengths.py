"""Sounds are read to the end of their data: headers without a length, chained streams, recordings without an end.

Expected lengths are those of the samples that were written, and FFmpeg's where a format adds delays of its own.
"""

import io
import struct

import av
import numpy as np
import pytest
import soundfile
from audio_data import RATE, as_bytes, as_mpeg4, chirp

from megamm.common.errors import UnreadableMedia
from megamm.media import sound_file
from megamm.media.sound_file import check_sound, read_waveform
from megamm.media.sound_length import _ogg_checksum, mp3_declared_samples

SOUND = chirp(1, seconds=2.0)
HALF = len(SOUND) // 2
WAV = as_bytes((SOUND * 2**15).astype(np.int16), "wav")


def mp3(samples=SOUND, mode="VARIABLE"):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    return file.getvalue()


def without_first_frame(data):
    """Remove the frame with the Xing header, as streaming servers do: the next frame has the same version and rate."""
    following = data.find(data[:2], 4)
    while data[following + 2] & 0x0C != data[2] & 0x0C:
        following = data.find(data[:2], following + 1)
    return data[following:]


def half_loud():
    """Noise after a quiet tone: a variable bit rate whose first frames say nothing about the rest."""
    samples = 0.01 * SOUND
    samples[HALF:] += 0.2 * np.random.default_rng(0).standard_normal(len(samples) - HALF).astype(np.float32)
    return samples


def length(data, extension):
    return len(read_waveform(data, extension, RATE, 60.0))


def ffmpeg_length(data, container):
    with av.open(io.BytesIO(data), format=container, metadata_errors="replace") as file:
        rate = file.streams.audio[0].rate
        return sum(frame.samples for frame in file.decode(audio=0)) * RATE / rate


def test_a_variable_mp3_without_a_header_is_read_to_its_end():
    whole = mp3(half_loud())
    assert b"Xing" in whole[:200] and length(whole, "mp3") == len(SOUND)
    bare = without_first_frame(whole)
    assert b"Xing" not in bare and mp3_declared_samples(bare) == 0
    with soundfile.SoundFile(io.BytesIO(bare)) as estimated:
        assert abs(estimated.frames - len(SOUND)) > RATE // 10  # what libsndfile would stop at
    assert length(bare, "mp3") == ffmpeg_length(bare, "mp3")
    read = read_waveform(bare, "mp3", RATE, 60.0)
    assert 0 <= len(read) - len(SOUND) <= 4 * 576  # the encoder's delay and padding, which only the header names
    best = max(np.corrcoef(read[shift : shift + len(SOUND)], half_loud())[0, 1] for shift in range(500, 1300))
    assert best > 0.75  # noise at the lowest quality
    assert len(check_sound(bare, "mp3")) == 64


def test_mp3s_behind_each_other_are_read_to_the_end():
    for data in (mp3() + mp3(), mp3(mode="CONSTANT") * 2, mp3() + without_first_frame(mp3())):
        assert abs(length(data, "mp3") - 2 * len(SOUND)) <= 6 * 576


def test_an_mp3_whose_header_says_less_is_read_to_its_end_and_one_that_says_more_is_truncated():
    data = mp3()
    at = data.find(b"Xing") + 8
    frames = int.from_bytes(data[at : at + 4], "big")
    less = data[:at] + (frames // 3).to_bytes(4, "big") + data[at + 4 :]
    assert length(less, "mp3") > len(SOUND) - 4 * 576
    with pytest.raises(UnreadableMedia, match="truncated"):
        check_sound(data[: len(data) * 2 // 3], "mp3")


def wav_of_sizes(riff, size, data=WAV):
    return data[:4] + struct.pack("<I", riff) + data[8:40] + struct.pack("<I", size) + data[44:]


PIPES = {
    "sox": (0x7FFFF024, 0x7FFFF000),
    "sox, all of 31 bits": (0x7FFFFFFF, 0x80000000 - 36),
    "kaldi's example": (0x7FFFFFFF, 0x80000000),
    "arecord": (0x80000024, 0x80000000),
    "ffmpeg": (0xFFFFFFFF, 0xFFFFFFFF),
    "all bits less the header": (0xFFFFFFFF, 0xFFFFFFFF - 36),
    "never completed": (0, 0),
    "never completed, of an empty file": (36, 0),
    "the whole is unknown only": (0xFFFFFFFF, len(WAV) - 44),
    "the whole is wrong only": (len(WAV) + 500, len(WAV) - 44),
}


@pytest.mark.parametrize("what", PIPES)
def test_a_wav_without_its_length_is_read_to_its_end(what):
    piped = wav_of_sizes(*PIPES[what])
    assert check_sound(piped, "wav") == check_sound(WAV, "wav")
    assert length(piped, "wav") == len(SOUND)
    if what == "sox":
        assert length(piped[:-1], "wav") == len(SOUND) - 1  # half a sample is none


def test_a_wav_with_a_length_is_truncated_if_it_is_shorter():
    for data, reason in ((WAV[:-10], "truncated: 63990 of 64000 bytes"), (wav_of_sizes(36, 0)[:44], "shorter than")):
        with pytest.raises(UnreadableMedia, match=reason):
            check_sound(data, "wav")


def test_big_endian_and_64_bit_wavs_are_read_to_their_end():
    file = io.BytesIO()
    soundfile.write(file, SOUND, RATE, format="WAV", subtype="PCM_16", endian="BIG")
    rifx = file.getvalue()
    assert rifx[:4] == b"RIFX" and length(rifx, "wav") == len(SOUND)
    at = rifx.find(b"data") + 4
    assert length(rifx[:at] + b"\x7f\xff\xf0\0" + rifx[at + 4 :], "wav") == len(SOUND)
    file = io.BytesIO()
    soundfile.write(file, SOUND, RATE, format="RF64", subtype="PCM_16")
    rf64 = file.getvalue()
    assert rf64[12:16] == b"ds64" and length(rf64, "wav") == len(SOUND)
    for sizes in ((0, 0, 0), (2**64 - 1,) * 3, (0xFFFFFFFF, 0xFFFFFFFF, 0)):
        piped = rf64[:20] + struct.pack("<3Q", *sizes) + rf64[44:]
        assert check_sound(piped, "wav") == check_sound(rf64, "wav"), sizes
    with pytest.raises(UnreadableMedia, match="truncated"):
        check_sound(rf64[:-100], "wav")


def flac_of(samples, claimed):
    data = as_bytes(samples, "flac")
    return data[:21] + ((data[21] & 0xF0) << 32 | claimed).to_bytes(5, "big") + data[26:]


@pytest.mark.parametrize("claimed", [0, 1, HALF])
def test_a_flac_that_declares_fewer_samples_or_none_is_read_to_its_end(claimed):
    data = flac_of(SOUND, claimed)
    assert check_sound(data, "flac") == check_sound(as_bytes(SOUND, "flac"), "flac")
    assert length(data, "flac") == len(SOUND) == ffmpeg_length(data, "flac")


def test_flacs_behind_each_other_are_read_to_the_last():
    stereo = as_bytes(np.stack([SOUND[:HALF], SOUND[:HALF]], 1), "flac")
    mono = as_bytes(SOUND, "flac")
    both = mono + stereo
    assert length(both, "flac") == len(SOUND) + HALF
    np.testing.assert_allclose(read_waveform(both, "flac", RATE, 60.0)[len(SOUND) :], SOUND[:HALF], atol=2**-14)
    # FFmpeg decodes the frames of both, of the second one only from the first that its parser finds.
    assert len(SOUND) < ffmpeg_length(both, "flac") <= length(both, "flac")
    assert length(mono + b"TAG" + bytes(125), "flac") == len(SOUND)
    for broken in (mono + stereo[:-1000], mono[:-1000] + stereo):
        with pytest.raises(UnreadableMedia, match=r"broken FLAC|truncated"):
            check_sound(broken, "flac")


def pages(data):
    """The pages of an Ogg file."""
    starts = [at for at in range(len(data)) if data.startswith(b"OggS\0", at)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def page_with(page, flags=None, granule=None, number=None):
    """A page with another header and the checksum of it."""
    _, _, old_flags, old_granule, serial, old_number = struct.unpack_from("<4sBBqII", page)
    new = (old if given is None else given for given, old in ((flags, old_flags), (granule, old_granule)))
    head = struct.pack("<4sBBqII", b"OggS", 0, *new, serial, old_number if number is None else number)
    return head + struct.pack("<I", _ogg_checksum(head + bytes(4) + page[26:])) + page[26:]


LONG = chirp(4, seconds=20.0)
OGGS = {extension: as_bytes(LONG, extension) for extension in ("ogg", "opus")}


@pytest.mark.parametrize("extension", OGGS)
def test_an_ogg_without_the_flag_for_its_end_is_read(extension):
    whole = OGGS[extension]
    *first, last = pages(whole)
    assert len(first) > 4 and last[5] & 4 and page_with(last) == last  # the checksum is the library's
    recorded = b"".join([*first, page_with(last, flags=last[5] & ~4)])
    assert check_sound(recorded, extension) == check_sound(whole, extension)
    shorter = b"".join(page_with(page, flags=page[5] & ~4) for page in first)
    assert abs(length(shorter, extension) - ffmpeg_length(shorter, "ogg")) < RATE // 10
    assert 0 < length(whole, extension) - length(shorter, extension) < 3 * RATE


@pytest.mark.parametrize("extension", OGGS)
def test_chained_oggs_are_read_to_the_last(extension):
    both = OGGS[extension] + as_bytes(SOUND, extension)
    assert abs(length(both, extension) - len(LONG) - len(SOUND)) <= 2
    assert abs(ffmpeg_length(both, "ogg") - length(both, extension)) < RATE // 10
    file = io.BytesIO()
    soundfile.write(file, SOUND, 2 * RATE if extension == "ogg" else 24_000, format="OGG", subtype="VORBIS")
    with pytest.raises(UnreadableMedia, match="sample rate changes"):
        check_sound(OGGS["ogg"] + file.getvalue(), "ogg")


@pytest.mark.parametrize("extension", OGGS)
def test_pages_of_an_ogg_that_are_damaged_or_missing_are_noticed(extension):
    every = pages(OGGS[extension])
    middle = len(every) // 2
    damaged = bytearray(every[middle])
    damaged[len(damaged) // 2] ^= 1
    cases = {
        "damaged": [*every[:middle], bytes(damaged), *every[middle + 1 :]],
        "missing": [*every[:middle], *every[middle + 1 :]],
        "no page": [*every[:middle], b"junk", *every[middle:]],
        "truncated": [*every[:-1], every[-1][:-1]],
    }
    for reason, parts in cases.items():
        with pytest.raises(UnreadableMedia, match=reason):
            check_sound(b"".join(parts), extension)


def test_a_recording_of_a_running_stream_is_read():
    """The headers, then the pages from the middle on, as a listener gets them who joins late."""
    every = pages(OGGS["ogg"])
    headers = sum(struct.unpack_from("<q", page, 6)[0] == 0 for page in every)
    recorded = b"".join([*every[:headers], *every[headers + 2 :]])
    assert abs(length(recorded, "ogg") - ffmpeg_length(recorded, "ogg")) < RATE // 10


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "opus", "mp3", "m4a", "aac"])
def test_a_decoder_that_stops_early_is_noticed(extension, monkeypatch):
    """Every decoder, made to stop after a second, contradicts the packets of the file."""
    sound = chirp(4, seconds=12.0)
    data = as_mpeg4(sound, extension) if extension in ("m4a", "aac") else as_bytes(sound, extension)
    for name in ("_blocks", "_mp3_blocks", "_av_frames"):
        real = getattr(sound_file, name)

        def short(*given, real=real, name=name):
            for count, block in enumerate(real(*given)):
                if count < (1 if name == "_blocks" else RATE // 1152):
                    yield block[:RATE] if name == "_blocks" else block

        monkeypatch.setattr(sound_file, name, short)
    monkeypatch.setattr(sound_file, "mp3_declared_samples", lambda data: 0)
    with pytest.raises(UnreadableMedia, match=r"truncated: 1\d{4} of|the decoder of \w+ stops after [01]\."):
        check_sound(data, extension)


def test_an_mp3_that_only_libsndfile_can_open_is_unreadable():
    """The header of a first frame with a wrong byte behind it, and the file cut after it: found by fuzz_media.py."""
    data = bytearray(mp3()[:406])
    data[6] = 0x10
    with soundfile.SoundFile(io.BytesIO(bytes(data))), pytest.raises(av.InvalidDataError):
        av.open(io.BytesIO(bytes(data)), format="mp3")
    with pytest.raises(UnreadableMedia, match="not an MP3 file, or its header is broken: Invalid data found"):
        check_sound(bytes(data), "mp3")


MPEG4 = {
    "m4a": lambda **options: as_mpeg4(SOUND, "m4a", **options),
    "m4a of alac": lambda **options: as_mpeg4(SOUND, "m4a", "alac", **options),
    "aac": lambda **options: as_mpeg4(SOUND, "aac", **options),
}


@pytest.mark.parametrize("what", MPEG4)
def test_aac_and_alac_are_read_as_ffmpeg_decodes_them(what):
    extension, data = what[:3], MPEG4[what]()
    assert length(data, extension) == ffmpeg_length(data, {"m4a": "mp4"}.get(extension, extension))
    # MP4 names the encoder's delay of 1024 samples in an edit list, ADTS cannot; the last frame of 1024 is full.
    delay = 1024 if extension == "aac" else 0
    read = read_waveform(data, extension, RATE, 60.0)[delay:]
    assert 0 <= len(read) - len(SOUND) < 1024
    if what == "m4a of alac":
        assert len(read) == len(SOUND) and np.abs(read - SOUND).max() <= 2**-15
    assert np.corrcoef(read[: len(SOUND)], SOUND)[0, 1] > 0.98
    assert len(check_sound(data, extension)) == 64


def mp4_with(data, name, offset, value):
    """A file with another 32-bit number in the first box of a name, counted from behind its name."""
    at = data.find(name) + 4 + offset
    return data[:at] + struct.pack(">I", value) + data[at + 4 :]


def test_the_data_of_an_m4a_count_and_not_its_headers():
    whole = MPEG4["m4a"]()
    expected = check_sound(whole, "m4a")
    assert struct.unpack_from(">2I", whole, whole.find(b"mdhd") + 16) == (RATE, 33 * 1024 - 768)
    # A wrong length of the track changes nothing, whatever it says.
    for duration in (0, 1, 2**31):
        assert check_sound(mp4_with(whole, b"mdhd", 16, duration), "m4a") == expected
    # An edit list is what its author wants to be heard: half of the sound, as FFmpeg and players show it.
    half = mp4_with(whole, b"elst", 8, 1000)
    assert length(half, "m4a") == ffmpeg_length(half, "mp4") == RATE + 384
    # A table of fewer packets than durations: the rest of the sound cannot be found.
    with pytest.raises(UnreadableMedia, match="truncated: 10240 of 33024 samples"):
        check_sound(mp4_with(whole, b"stsz", 8, 10), "m4a")


def test_an_m4a_in_fragments_is_read_to_its_end_or_truncated():
    for codec in ("m4a", "m4a of alac"):
        data = MPEG4[codec](movflags="frag_keyframe+empty_moov")
        assert 0 <= length(data, "m4a") - len(SOUND) < 2048
        with pytest.raises(UnreadableMedia, match="broken M4A data"):
            check_sound(data[:-2000], "m4a")


def adts(samples=SOUND, **options):
    """The frames of an AAC file."""
    data, frames = as_mpeg4(samples, "aac", **options), []
    while data:
        size = (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
        frames.append(data[:size])
        data = data[size:]
    return frames


ID3 = b"ID3\4\0\0\0\0\0\5hello"


def test_adts_frames_are_read_with_tags_around_them_and_behind_each_other():
    frames = adts()
    whole = b"".join(frames)
    assert len(frames) == 33 and length(whole, "aac") == 33 * 1024
    for tagged in (ID3 + whole, whole + b"TAG" + bytes(125), b"".join([*frames[:9], ID3, *frames[9:]])):
        assert check_sound(tagged, "aac") == check_sound(whole, "aac")
    assert length(whole + ID3 + whole, "aac") == 66 * 1024 == ffmpeg_length(whole + whole, "aac")
    # A recording that begins in the middle of a frame, which cannot be decoded.
    assert length(frames[4][100:] + b"".join(frames[5:]), "aac") == 28 * 1024


def test_bytes_between_adts_frames_are_noticed():
    """FFmpeg looks for the next frame instead, without a word."""
    frames = adts()
    junk = b"".join([*frames[:9], bytes(500), *frames[9:]])
    assert ffmpeg_length(junk, "aac") > 0
    at = sum(map(len, frames[:9]))
    several = bytearray(frames[9])
    several[6] |= 1
    cases = {
        f"no frame at byte {at}": [*frames[:9], bytes(500), *frames[9:]],
        "no frame at byte": [*frames[:9], frames[9][:-10], *frames[10:]],
        "the last frame is missing": [*frames[:-2], frames[-2][:-1]],
        "the end of its last tag": [*frames[:9], ID3[:6] + b"\1" + ID3[7:], *frames[9:]],
        r"no frame at byte 0$": [bytes(3000), *frames],
        "several blocks": [*frames[:9], bytes(several), *frames[10:]],
        "sample rate changes from 16000 to 32000": [*frames, *adts(rate=32_000)],
        "no frame at byte 0": [b"no sound at all " * 999],
    }
    for reason, parts in cases.items():
        with pytest.raises(UnreadableMedia, match=reason):
            check_sound(b"".join(parts), "aac")


def test_an_m4a_that_is_none_or_has_another_codec_is_refused():
    opus = io.BytesIO()
    tracks = io.BytesIO()
    for file, codecs in ((opus, ["libopus"]), (tracks, ["aac", "aac"])):
        with av.open(file, "w", format="mp4") as container:
            streams = [container.add_stream(codec, rate=48_000, layout="mono") for codec in codecs]
            for stream in streams:
                frame = av.AudioFrame.from_ndarray(SOUND[None, :1024].copy(), format="fltp", layout="mono")
                frame.sample_rate = 48_000
                for packet in (*stream.encode(frame), *stream.encode(None)):
                    container.mux(packet)
    cases = {
        "neither AAC nor ALAC, but opus": (opus.getvalue(), "m4a"),
        "has 2 sound tracks": (tracks.getvalue(), "m4a"),
        "not an MP4 file with the extension .m4a": (MPEG4["aac"](), "m4a"),
        "an MP4 file with the extension .aac": (MPEG4["m4a"](), "aac"),
        "not an M4A file": (MPEG4["m4a"]()[:2000], "m4a"),
    }
    for reason, (data, extension) in cases.items():
        with pytest.raises(UnreadableMedia, match=reason):
            check_sound(data, extension)


def with_channels(frame, pairs):
    """An ADTS frame of a mono sound that declares the channel and some pairs in a program config element."""
    # ISO/IEC 14496-3, 4.4.1.1: element 5, tag 0, LC, rate 8 (16 kHz); counts of front, side, back, LFE, data and
    # coupling elements; no mixdowns; the front elements, each with a bit for a pair and a tag; no comment.
    bits = "101" + "0000" + "01" + "1000" + f"{1 + pairs:04b}" + 4 * "0" + 4 * "0" + "00" + "000" + "0000" + "000"
    bits += "00000" + "".join(f"1{tag:04b}" for tag in range(pairs))
    bits += "0" * (-len(bits) % 8) + 8 * "0"
    body = int(bits, 2).to_bytes(len(bits) // 8, "big") + frame[7:]
    size = 7 + len(body)
    head = [frame[2] & 0xFE, size >> 11 & 3, size >> 3 & 0xFF, (size & 7) << 5 | frame[5] & 0x1F, frame[6]]
    return frame[:2] + bytes(head) + body


def test_more_channels_than_pyav_can_read_are_refused():
    """They ended the process: `to_ndarray` of PyAV 18 reads behind the 8 planes of a frame."""
    seven, nine = (b"".join(with_channels(frame, pairs) for frame in adts()) for pairs in (3, 4))
    with av.open(io.BytesIO(nine), format="aac") as file:
        assert next(file.decode(audio=0)).layout.nb_channels == 9
    with pytest.raises(UnreadableMedia, match="has 9 channels, more than 8"):
        check_sound(nine, "aac")
    assert len(check_sound(seven, "aac")) == 64


def test_tags_in_other_encodings_than_utf_8_change_nothing():
    """Latin-1, as ID3v1 has it: the digests are those of the files without the tag."""
    old = b"TAG" + "Caf\u00e9".encode("latin-1").ljust(125, b"\0")
    assert check_sound(mp3() + old, "mp3") == check_sound(mp3(), "mp3")
    whole = MPEG4["m4a"](movflags="use_metadata_tags")
    handler = whole.find(b"SoundHandler")
    assert handler > 0
    latin = whole[:handler] + b"Caf\xe9" + whole[handler + 4 :]
    assert check_sound(latin, "m4a") == check_sound(whole, "m4a")
