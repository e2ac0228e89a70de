"""What stands around the frames of an MP3 or before a FLAC is not decoded, and hides none of the sound.

Expected samples are FFmpeg's of the same frames alone. The forms of the tags are those of id3.org, the APEv2
specification and Lyrics3.
"""

import io
import itertools

import av
import numpy as np
import pytest
import soundfile
from audio_data import RATE, as_bytes, chirp

from megamm.common.errors import UnreadableMedia
from megamm.media.mp3_frames import mp3_frames
from megamm.media.sound_file import check_sound, read_waveform

SOUND = chirp(1, seconds=1.0)


def mp3(rate):
    """Frames alone, without a Xing header: of a constant bit rate, encoded by LAME through FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(SOUND[None].astype(np.float32), format="fltp", layout="mono")
        frame.rate = RATE
        for resampled in av.AudioResampler(format="fltp", layout="mono", rate=rate).resample(frame):
            container.mux(stream.encode(resampled))
        container.mux(stream.encode())
    return file.getvalue()


FRAMES = {rate: mp3(rate) for rate in (44100, 22050, 8000)}
ID3 = b"ID3\x03\0\0\0\0\x08\0" + bytes(1024)
ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + (2000).to_bytes(4, "little") + (40).to_bytes(4, "little") + bytes(4) + b"\0\0\0\x80" + bytes(8)
APE += (
    bytes(8) + b"APETAGEX" + (2000).to_bytes(4, "little") + (40).to_bytes(4, "little") + bytes(7) + b"\x80" + bytes(8)
)
LYRICS = b"LYRICSBEGININD0000200" + b"000021LYRICS200"


def samples(data):
    with av.open(io.BytesIO(data), format="mp3") as file:
        return np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])


BEFORE = [b"", ID3, ID3 + bytes(700), bytes(3000)]
AFTER = [b"", APE + LYRICS + ID3V1, APE, LYRICS + ID3V1, bytes(300), bytes(90) + ID3V1]


@pytest.mark.parametrize("rate", FRAMES)
def test_tags_and_zeros_around_the_frames_of_an_mp3_change_nothing(rate):
    frames = FRAMES[rate]
    read = read_waveform(frames, "mp3", rate, 60.0)
    np.testing.assert_array_equal(read, samples(frames).clip(-1, 1))
    for before, after in itertools.zip_longest(BEFORE, AFTER, fillvalue=b""):
        assert check_sound(before + frames + after, "mp3") == check_sound(frames, "mp3"), (len(before), len(after))


def test_an_mp3_of_a_running_stream_begins_with_its_first_whole_frame():
    whole = FRAMES[44100]
    for cut in (50, 150, 1000):
        data = mp3_frames(whole[cut:])
        assert whole.endswith(data) and len(whole) - cut - len(data) < 2 * 210
        assert len(read_waveform(whole[cut:], "mp3", 44100, 60.0)) == len(samples(data))


@pytest.mark.parametrize("data", [b"<html>404</html>" * 300, bytes(5000), b"", b"\xff\xfb\x90\x64"], ids=len)
def test_what_does_not_consist_of_frames_stays_unreadable(data):
    assert mp3_frames(data) == data
    with pytest.raises(UnreadableMedia):
        check_sound(data, "mp3")


def test_more_than_a_part_of_a_frame_before_the_first_is_noticed():
    with pytest.raises(UnreadableMedia, match="not a sound file"):
        check_sound(b"x" * 4000 + FRAMES[44100], "mp3")


def test_a_flac_with_an_id3_tag_before_it_is_read():
    flac = as_bytes((SOUND * 2**15).astype(np.int16), "flac")
    assert check_sound(ID3 + flac, "flac") == check_sound(flac, "flac")


def test_an_ogg_of_another_codec_is_refused_by_name():
    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((SOUND * 2**15).astype(np.int16)[None], format="s16", layout="mono")
        frame.rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.SoundFile(io.BytesIO(file.getvalue()))
    with pytest.raises(UnreadableMedia, match="an Ogg file of FLAC, only Vorbis and Opus are read: convert it"):
        check_sound(file.getvalue(), "ogg")
