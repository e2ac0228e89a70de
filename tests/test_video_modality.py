"""Videos: rejected files, choice of frames and their layout in the square, and the modality's contract."""

import io
import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from codec_data import as_bytes, shape_video, video_bytes
from PIL import Image

from megamm.common.errors import UnreadableMedia, UserError
from megamm.media import video_file
from megamm.media.image_file import square_pixels
from megamm.media.video_clip import decode_clip, plan_clip
from megamm.media.video_file import (
    orientation_of,
    sampled_frames,
    sampled_squares,
    shown_frames,
    usable_frames,
    write_mp4,
)
from megamm.modalities.image import ImageModality
from megamm.modalities.video import VideoModality
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig

MOVING = shape_video(3, frames=24)
MP4, WEBM = video_bytes(MOVING), video_bytes(MOVING, container="webm")
H264 = video_bytes(MOVING, container="matroska", codec="libx264")
FRAGMENTED = video_bytes(MOVING, codec="libx264", movflags="frag_keyframe+empty_moov")


def levels(count, size=16):
    """Return frames `[count, size, size, 3]`, frame f is grey, 5 f + 20."""
    return np.stack([np.full((size, size, 3), 5 * f + 20, np.uint8) for f in range(count)])


def numbers_of(frames):
    """Invert `levels`, through lossy coding."""
    return [round((float(frame[4:-4, 4:-4].mean()) - 20) / 5) for frame in frames]


def sound_only():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def flipped(data, at):
    return data[:at] + bytes(b ^ 0xFF for b in data[at : at + 8]) + data[at + 8 :]


BAD = {
    "zero bytes": (b"", "mp4", "zero bytes"),
    "garbage": (np.random.default_rng(0).bytes(5000), "mp4", "neither MP4"),
    "garbage in a box": (b"\0\0\0\x18ftyp" + np.random.default_rng(0).bytes(5000), "mp4", "broken mp4"),
    "garbage after the magic": (b"\x1a\x45\xdf\xa3" + np.random.default_rng(0).bytes(5000), "webm", "broken webm"),
    "html": (b"<html>404 not found</html>", "webm", "neither MP4"),
    "a playlist": (b"#EXTM3U\nfile:///etc/passwd\n", "mp4", "neither MP4"),
    "a picture": (as_bytes(Image.new("RGB", (32, 32))), "mp4", "neither MP4"),
    "webm named mp4": (WEBM, "mp4", "a Matroska file with the extension .mp4"),
    "mp4 named webm": (MP4, "webm", "an MP4 file with the extension .webm"),
    "mp4 named avi": (MP4, "avi", "an MP4 file with the extension .avi"),
    "sound only": (sound_only(), "mp4", "no video"),
    "damaged": (flipped(H264, len(H264) // 2), "mkv", "broken mkv|no readable frame"),
    "ten minutes and more": (
        video_bytes(levels(2), times=[0, 700_000], container="matroska"),
        "mkv",
        "longer than 600 s",
    ),
    **{f"mp4 cut at {c}": (MP4[: int(c * len(MP4))], "mp4", "broken|no ") for c in (0.01, 0.1, 0.5, 0.7, 0.9)},
    **{f"webm cut at {c}": (WEBM[: int(c * len(WEBM))], "webm", "broken|truncated") for c in (0.01, 0.1, 0.5, 0.9)},
    **{f"fragments cut at {c}": (FRAGMENTED[: int(c * len(FRAGMENTED))], "mp4", "broken|no ") for c in (0.1, 0.5, 0.9)},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_videos_are_refused_with_the_reason(name):
    data, extension, reason = BAD[name]
    with pytest.raises(UnreadableMedia, match=reason):
        VideoModality.check_media(data, extension)
    if name not in ("ten minutes and more", "damaged"):  # correct as far as it is read
        with pytest.raises(UnreadableMedia, match=reason):
            sampled_squares(data, extension, 8, 100, 16)


def test_large_videos_are_refused_from_the_header_and_in_all(monkeypatch):
    data = video_bytes(np.zeros((4, 128, 128, 3), np.uint8))
    monkeypatch.setattr(video_file, "MAX_PIXELS", 128 * 128 - 1)
    with pytest.raises(UnreadableMedia, match="128 x 128 is more than 16383 pixels"):
        VideoModality.check_media(data, "mp4")
    monkeypatch.setattr(video_file, "MAX_PIXELS", 128 * 128)
    assert VideoModality.check_media(data, "mp4")
    monkeypatch.setattr(video_file, "MAX_DECODED_PIXELS", 4 * 128 * 128 - 1)
    with pytest.raises(UnreadableMedia, match="in all its frames"):
        VideoModality.check_media(data, "mp4")


def test_the_size_limit_holds_where_the_size_changes_later(monkeypatch):
    small, medium, large = (
        video_bytes(np.zeros((1, size, size, 3), np.uint8), codec="libx264", container="h264")
        for size in (128, 160, 512)
    )
    for other, reason in ((medium, "160 x 160 is more"), (large, "broken mkv")):  # by FFmpeg, before it is decoded
        file = io.BytesIO()
        with av.open(io.BytesIO(small + other), format="h264") as given, av.open(file, "w", format="matroska") as out:
            stream = out.add_stream_from_template(given.streams.video[0])
            for number, packet in enumerate(p for p in given.demux() if p.size):
                packet.stream, packet.time_base = stream, Fraction(1, 8)
                packet.pts = packet.dts = number
                out.mux(packet)
        data = file.getvalue()
        monkeypatch.setattr(video_file, "MAX_PIXELS", 512 * 512)
        widths = [shown.frame.width for shown in shown_frames(data, "mkv")]
        assert widths[0] == 128 < widths[1]
        monkeypatch.setattr(video_file, "MAX_PIXELS", 128 * 128)
        with pytest.raises(UnreadableMedia, match=reason):
            VideoModality.check_media(data, "mkv")


def remuxed(data, source, target):
    """Return the same packets in another container."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data), format=source) as given, av.open(file, "w", format=target) as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux():
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libx264"])
def test_good_videos_are_accepted_and_told_apart_by_what_they_show(codec):
    data = video_bytes(MOVING, container="matroska", codec=codec)
    kinds = ("mp4", "webm") if codec == "libvpx-vp9" else ("mp4", "mov")
    digests = {VideoModality.check_media(data, "mkv")}
    digests |= {VideoModality.check_media(remuxed(data, "matroska", kind), kind) for kind in kinds}
    assert len(digests) == 1
    other = VideoModality.check_media(video_bytes(MOVING[:23], container="matroska", codec=codec), "mkv")
    assert other not in digests and len(other) == 64
    assert sampled_squares(data, "mkv", 8, 100, 32).shape == (24, 32, 32, 3)


def shown_by_search(starts, end, rate, limit):
    """Apply the definition for each time: the last frame that begins at or before it, within a millisecond."""
    chosen, k = [0], 1
    while len(chosen) < limit and k / rate < end - 1e-3:
        chosen.append(max(i for i, start in enumerate(starts) if start <= k / rate + 1e-3))
        k += 1
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_sampling_takes_the_frame_that_is_shown_at_each_time(seed):
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], rng.uniform(0.001, 0.4, rng.integers(0, 30)).cumsum()]).round(4).tolist()
    end, rate, limit = starts[-1] + rng.uniform(0.01, 0.5), rng.uniform(0.5, 30), int(rng.integers(1, 50))
    assert sampled_frames(starts, end, rate, limit) == shown_by_search(starts, end, rate, limit)


def test_sampling_at_whole_fractions_of_the_rate_and_the_usable_length():
    for rate in (24, 25, 30, Fraction(30000, 1001), 60):
        starts = [float(f / Fraction(rate)) for f in range(120)]
        rounded = [round(s, 3) for s in starts]  # as Matroska has them
        for every in (1, 2, 3, 5):
            hz = float(Fraction(rate) / every)
            expected = list(range(0, 120, every))
            assert sampled_frames(starts, starts[-1] + float(1 / Fraction(rate)), hz, 999) == expected
            assert sampled_frames(rounded, rounded[-1] + float(1 / Fraction(rate)), hz, 999) == expected
    assert sampled_frames([0.0], 0.0, 8, 5) == [0]
    assert [usable_frames(f, 17, 4) for f in (1, 4, 5, 8, 16, 17, 400)] == [1, 1, 5, 5, 13, 17, 17]
    assert [usable_frames(f, 16, 4) for f in (16, 17)] == [13, 13]


@pytest.mark.parametrize(("rate", "hz"), [(24, 8), (8, 24), (30, 8), (Fraction(30000, 1001), 10), (8, 8)])
@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_frames_of_a_file_are_sampled_by_time(rate, hz, container):
    data = video_bytes(levels(30), rate, container)
    starts = [float(f / Fraction(rate)) for f in range(30)]
    expected = sampled_frames(starts, float(30 / Fraction(rate)), hz, 40)
    assert numbers_of(sampled_squares(data, container, hz, 40, 16)) == expected


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_frame_rate_is_sampled_by_time(container):
    times = [0, 40, 80, 500, 510, 520, 1000, 2500, 2533, 2900]
    data = video_bytes(levels(10), times=times, container=container)
    got = numbers_of(sampled_squares(data, {"mp4": "mp4"}.get(container, "mkv"), 10, 30, 16))
    assert got[:29] == shown_by_search([t / 1000 for t in times], 2.9, 10, 100)
    assert got[29:] in ([], [9])  # the container defines how long the last frame is shown


def test_times_count_from_the_first_frame():
    data = video_bytes(levels(10), times=[3000 + 125 * f for f in range(10)], container="matroska")
    assert numbers_of(sampled_squares(data, "mkv", 8, 9, 16)) == list(range(9))


def test_decoding_stops_when_enough_is_read():
    late = next(at for at in range(len(H264) - 400, 0, -16) if is_refused(flipped(H264, at)))
    assert sampled_squares(flipped(H264, late), "mkv", 8, 5, 16).shape[0] == 5
    with pytest.raises(UnreadableMedia, match="broken"):
        sampled_squares(flipped(H264, late), "mkv", 8, 24, 16)


def is_refused(data):
    try:
        VideoModality.check_media(data, "mkv")
    except UnreadableMedia:
        return True
    return False


@pytest.mark.parametrize(("height", "width"), [(33, 47), (1, 5), (47, 16), (64, 48)])
def test_frames_lie_in_the_square_as_images_do(height, width):
    """The video is lossless in RGB, so that the two readers must agree to the bit."""
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    expected = square_pixels(as_bytes(Image.fromarray(picture)), "png", 32)
    assert np.array_equal(sampled_squares(file.getvalue(), "mkv", 8, 1, 32)[0], expected)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_is_applied(degrees):
    picture = np.zeros((24, 48, 3), np.uint8)
    picture[:12, :24] = 255  # white at the top left
    data = video_bytes(picture[None], rotation=degrees)
    square = sampled_squares(data, "mp4", 8, 1, 48)[0].astype(int)
    upright = np.rot90(picture, round(degrees / 90))
    tall = abs(degrees) == 90
    inner = square[:, 12:36] if tall else square[12:36]
    assert np.abs(inner - upright.astype(int)).mean() < 12
    assert (square[:, :12] if tall else square[:12]).min() == 255


MATRICES = [
    (1, 0, 0, 1),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (-1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
    (0, 1, -1, 0),
    (0, -1, 1, 0),
]


def with_matrix(data, a, b, c, d):
    """The mp4 with another display matrix in the header of its track (ISO/IEC 14496-12, section 8.3)."""
    at = data.find(b"tkhd") + 44
    rows = struct.pack(">9i", *(round(v * 65536) for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    return data[:at] + rows + data[at + 36 :]


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_display_matrix_is_applied_as_it_is_defined(matrix):
    """The pixel (x, y) is shown at (a x + c y, b x + d y), moved into the picture; FFmpeg's filters do the same."""
    a, b, c, d = matrix
    picture = np.zeros((24, 48, 3), np.uint8)
    picture[:12, :24], picture[12:, :24] = (255, 0, 0), (0, 255, 0)
    data = with_matrix(video_bytes(picture[None], container="mp4"), *matrix)
    y, x = np.mgrid[:24, :48]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    expected = np.zeros((24, 48, 3) if a else (48, 24, 3), np.uint8)
    expected[shown_y - shown_y.min(), shown_x - shown_x.min()] = picture
    with av.open(io.BytesIO(data)) as file:
        frame = next(file.decode(video=0))
        assert np.array_equal(np.asarray(orientation_of(frame).image(frame.to_image())), by_filters(frame, matrix))
    sizes = VisualCodecConfig(image_size=48, max_frames=1)
    for square in (
        sampled_squares(data, "mp4", 8, 1, 48)[0],
        decode_clip(data, "mp4", plan_clip(data, "mp4", 0, sizes), 48)[0],
    ):
        inner = square[12:36] if a else square[:, 12:36]
        assert np.abs(inner.astype(int) - expected).mean() < 12
    stored = np.asarray(frame.to_image())[None]
    assert np.array_equal(orientation_of(frame).frames(stored)[0], by_filters(frame, matrix))


def by_filters(frame, matrix):
    """The frame after the filters that the ffmpeg program inserts for this matrix (ffmpeg_filter.c: autorotate)."""
    a, b, c, d = matrix
    angle = round(np.degrees(np.arctan2(b, a))) % 360
    filters = {
        90: [("transpose", "cclock_flip" if c > 0 else "clock")],
        270: [("transpose", "clock_flip" if c < 0 else "cclock")],
        180: [("hflip", None)] * (a < 0) + [("vflip", None)] * (d < 0),
        0: [("vflip", None)] * (d < 0),
    }[angle]
    graph = av.filter.Graph()
    plain = av.VideoFrame.from_ndarray(np.asarray(frame.to_image()), format="rgb24")
    nodes = [graph.add_buffer(width=plain.width, height=plain.height, format=plain.format, time_base=Fraction(1, 8))]
    nodes += [graph.add(name, value) for name, value in filters]
    nodes.append(graph.add("buffersink"))
    for one, other in itertools.pairwise(nodes):
        one.link_to(other)
    graph.configure()
    graph.push(plain)
    return graph.pull().to_ndarray(format="rgb24")


def test_a_rotation_that_is_no_quarter_turn_is_refused():
    data = video_bytes(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UnreadableMedia, match="rotated by 45 degrees"):
        VideoModality.check_media(with_matrix(data, 0.7071, 0.7071, -0.7071, 0.7071), "mp4")
    assert VideoModality.check_media(with_matrix(data, 1, 0.001, -0.001, 1), "mp4")


OPEN_GOP = {
    "libx264": {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"},
    "libx265": {"x265-params": "open-gop=1:keyint=10:bframes=3:scenecut=0:log-level=none"},
}


def open_gop(codec):
    """Thirty frames whose groups of pictures refer to the one before."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv420p", OPEN_GOP[codec]
        for number, pixels in enumerate(levels(30, 64)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def test_columns_that_a_file_crops_on_the_left_are_not_shown():
    """H.264 in quarters: the left and upper ones are cropped. FFmpeg keeps some of them unless it is asked not to."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"x264-params": "crop-rect=24,16,0,0"}
        pixels = np.full((64, 96, 3), 255, np.uint8)
        pixels[16:, 24:] = 0
        out.mux([*stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")), *stream.encode()])
    (shown,) = shown_frames(file.getvalue(), "mp4")
    assert shown.image().size == (72, 48) and np.asarray(shown.image()).max() < 40


def cut(data, container, packet):
    """`ffmpeg -c copy` from this packet on, in the order of the file."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as given, av.open(file, "w", format=container) as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for found in [p for p in given.demux() if p.size][packet:]:
            found.stream = stream
            out.mux(found)
    return file.getvalue()


@pytest.mark.parametrize("codec", OPEN_GOP)
def test_what_can_be_decoded_of_a_cut_video_is_used(codec):
    """Cut at the second keyframe, whose leading frames are lost, and in the middle of a group of pictures."""
    data = open_gop(codec)
    with av.open(io.BytesIO(data)) as file:
        keys = [number for number, p in enumerate(p for p in file.demux() if p.size) if p.is_keyframe]
    assert len(keys) > 2
    for container, extension in (("matroska", "mkv"), ("mp4", "mp4")):
        for packet in (keys[1], keys[1] - 4):
            part = cut(data, container, packet)
            with av.open(io.BytesIO(part)) as file:
                expected = [numbers_of([f.to_ndarray(format="rgb24")])[0] for f in file.decode(video=0)]
            assert expected[-1] == 29 and 15 <= len(expected) <= 28
            assert VideoModality.check_media(part, extension)
            assert numbers_of(sampled_squares(part, extension, 8, 60, 64)) == expected
            sizes = VisualCodecConfig(image_size=64, frame_rate=8, max_frames=9, frames_per_step=4)
            for start in (0, 1.0):
                plan = plan_clip(part, extension, start, sizes)
                clip = numbers_of(decode_clip(part, extension, plan, 64))
                assert clip == expected[int(8 * start) :][:9]


@pytest.mark.parametrize("codec", OPEN_GOP)
def test_clips_begin_at_any_frame_of_an_open_group(codec):
    data = open_gop(codec)
    sizes = VisualCodecConfig(image_size=64, frame_rate=8, max_frames=5, frames_per_step=4)
    for first in range(0, 25, 3):
        plan = plan_clip(data, "mkv", first / 8, sizes)
        assert numbers_of(decode_clip(data, "mkv", plan, 64)) == list(range(first, first + 5))


def test_damage_behind_the_cut_is_still_refused():
    part = cut(open_gop("libx264"), "matroska", 12)
    refused = sum(is_refused(flipped(part, at)) for at in range(len(part) // 3, len(part) - 200, 150))
    assert refused >= 3


def test_pixels_that_are_not_square_are_stretched():
    data = video_bytes(np.zeros((1, 32, 32, 3), np.uint8), aspect=Fraction(1, 2))
    square = sampled_squares(data, "mp4", 8, 1, 32)[0]
    assert square[:, :8].min() == 255 and square[:, 8:24].max() < 30 and square[:, 24:].min() == 255
    turned = video_bytes(np.zeros((1, 32, 32, 3), np.uint8), aspect=Fraction(1, 2), rotation=90)
    assert np.array_equal(sampled_squares(turned, "mp4", 8, 1, 32)[0], np.rot90(square))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    config = VisualCodecConfig(image_size=32, width=16, levels=(5, 4, 3), frames_per_step=4, max_frames=12)
    save_codec(VisualCodec(config), folder)
    return folder


def test_media_to_ids_and_back_through_the_protocol(folder):
    video = VideoModality.load(folder)
    media = [video.read_media(video_bytes(shape_video(n, frames)), "mp4") for n, frames in enumerate((9, 4, 24, 5, 9))]
    assert [len(m) for m in media] == [9, 1, 9, 5, 9] and media[0].shape == (9, 32, 32, 3)
    together, alone = video.encode(media), [video.encode([m])[0] for m in media]
    assert video.encode([]) == [] and video.vocabulary_size == 60
    assert (video.stride, video.tokens_per_item, video.valid_token_ids(5)) == (16, None, range(60))
    for ids, other, frames in zip(together, alone, media, strict=True):
        assert (
            ids.dtype == np.int64 and ids.shape == (16 * (1 + len(frames) // 4),) and 0 <= ids.min() <= ids.max() < 60
        )
        assert np.array_equal(ids, other)  # batching does not change the ids
        made = video.decode(ids)
        assert made.dtype == np.uint8 and made.shape == frames.shape
        assert video.read_media(video.write_media(made), "mp4").shape == made.shape
    for wrong in (np.zeros(15, np.int64), np.full(32, 60), np.zeros(0, np.int64)):
        with pytest.raises(ValueError, match="ids"):
            video.decode(wrong)


def test_the_first_latent_frame_is_the_image_of_the_first_frame(folder):
    video, image = VideoModality.load(folder), ImageModality.load(folder)
    frames = shape_video(7, frames=9)
    assert np.array_equal(video.encode([frames])[0][:16], image.encode([frames[0]])[0])
    assert video.codec_id == image.codec_id and video.tokenizer_name == image.tokenizer_name


def test_positions_are_frame_by_frame_and_row_by_row(folder):
    expected = [[t, h, w] for t in range(3) for h in range(4) for w in range(4)]
    assert VideoModality.load(folder).positions(48).T.tolist() == expected
    assert VideoModality.load(folder).positions(18).T.tolist() == expected[:18]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_what_is_written_plays_everywhere_and_reads_back(count):
    frames = shape_video(5, frames=count)
    data = write_mp4(frames, 8.0)
    assert data == write_mp4(frames, 8.0) and b"Lavf" not in data
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) in [
            ("vp9", "yuv420p"),
            ("libvpx-vp9", "yuv420p"),
        ]
        assert stream.profile == "Profile 0" and container.format.name.startswith("mov,mp4") and stream.frames == count
    back = sampled_squares(data, "mp4", 8, 100, 32)
    assert back.shape == frames.shape
    error = np.square(back.astype(float) - frames).mean()
    assert 10 * np.log10(255**2 / error) > 22  # colour has half the resolution


def test_no_codec_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a tokenizer for visual"):
        VideoModality.load(tmp_path)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_tags_in_other_encodings_than_utf_8_change_nothing(container):
    """Latin-1, as old recorders write it."""
    data = video_bytes(MOVING, codec="libx264", container={"mkv": "matroska"}.get(container, container))
    name = {"mp4": b"VideoHandler", "mkv": b"Lavf"}[container]
    assert data.count(name) >= 1
    latin = data.replace(name, b"Caf\xe9" + name[4:])
    assert VideoModality.check_media(latin, container) == VideoModality.check_media(data, container)
