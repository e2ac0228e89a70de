"""Video loading: the frames shown at the requested times, by each decoder; exact resume; broken files; seeking."""

import dataclasses
import importlib.util
import io
import json
import logging
import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import warm
from codec_data import shape_video, video_bytes
from typer.testing import CliRunner
from video_worker import SIZES, digests

from megamm.cli import app
from megamm.common import device
from megamm.common.errors import UnreadableMedia, UserError
from megamm.data.tokenize.token_cache import cache_name
from megamm.media import video_clip, video_stream
from megamm.media.video_clip import plan_clip
from megamm.media.video_dali import DaliDecoder, obstacle
from megamm.media.video_file import video_frames
from megamm.media.video_stream import Clip, VideoStream, choose_decoder
from megamm.modalities.protocol import CPU
from megamm.modalities.video import VideoModality
from megamm.shards.folder import ShardFolder, ShardWriter
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
DECODERS = [
    pytest.param(("pyav", "cpu"), id="pyav"),
    pytest.param(("dali", "cpu"), id="dali", marks=needs_dali),
    pytest.param(("dali", "gpu"), id="dali-gpu", marks=[needs_dali, pytest.mark.gpu]),
]


@pytest.fixture(params=DECODERS)
def decoder(request):
    """Return (decoder, device)."""
    name, place = request.param
    if place == "gpu" and not torch.accelerator.is_available():
        pytest.skip("torch sees no GPU")
    return name, device.choose(place).torch_device


def waves(frames, width, height, seed=0):
    """Return smooth moving colours, uint8 `[frames, height, width, 3]`, large enough for a GPU's decoder."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    t, y, x = np.mgrid[:frames, :height, :width]
    planes = [
        x / width * 6 + t / 5 + phase[0],
        y / height * 5 - t / 7 + phase[1],
        (x + y) / width * 4 + t / 4 + phase[2],
    ]
    return (127.5 + 120 * np.sin(np.stack(planes, -1))).astype(np.uint8)


def levels(frames, width=192, height=160):
    """Return frames of which frame f is grey, 4 f + 20."""
    return np.stack([np.full((height, width, 3), 4 * f + 20, np.uint8) for f in range(frames)])


def numbers_of(frames):
    """Invert `levels`, through lossy coding and white padding."""
    middle = frames.shape[1] // 2
    return [round((float(f[middle - 2 : middle + 2, middle - 2 : middle + 2].mean()) - 20) / 4) for f in frames]


def coded(frames, container="mp4", codec="libx264", rate=10, matrix=None, times=None, **options):
    """Encode uint8 `[F, Y, X, 3]` with options of the codec. matrix: the colour matrix to convert with and to name."""
    file, tick = io.BytesIO(), Fraction(1, 1000) if times else Fraction(1, rate)
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options={"crf": "10", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.time_base = tick
        if matrix:
            stream.codec_context.colorspace = matrix
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix)
            frame.pts, frame.time_base = times[number] if times else number, tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def with_a_hidden_frame(data):
    """Return VP8 with the keyframe repeated as a hidden frame, which changes only the count of packets."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as given, av.open(file, "w", format="webm") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if not packet.size:
                continue
            time, packet.stream = packet.pts, stream
            again = av.Packet(bytes([memoryview(packet)[0] & ~0x10]) + bytes(packet)[1:])
            out.mux(packet)
            if time == 0:
                again.pts = again.dts = 1
                again.time_base, again.stream, again.is_keyframe = Fraction(1, 1000), stream, True
                out.mux(again)
    return file.getvalue()


@cache
def plain():
    """Return a short video, encoded at first use like all files here, and not whenever tests are collected."""
    return video_bytes(waves(12, 192, 160), rate=10)


@cache
def good_files():
    return {
        "plain": (plain(), "mp4"),
        "tall": (video_bytes(waves(12, 160, 260), rate=10, container="webm"), "webm"),
        "odd": (video_bytes(waves(9, 193, 161), rate=10), "mp4"),
        "oblong pixels": (video_bytes(waves(9, 192, 160), aspect=Fraction(4, 3)), "mp4"),
        "turned": (video_bytes(waves(9, 210, 160), rotation=90), "mp4"),
        "upside down": (video_bytes(waves(9, 200, 160), rotation=180), "mp4"),
        "turned back": (video_bytes(waves(9, 190, 160), rotation=270), "mp4"),
        "varying": (
            video_bytes(waves(8, 192, 160), times=[0, 40, 90, 400, 410, 700, 900, 1300], container="matroska"),
            "mkv",
        ),
        "BT.709": (coded(waves(9, 192, 160), "webm", "libvpx-vp9", matrix=1), "webm"),
        "hidden frame": (with_a_hidden_frame(coded(waves(12, 192, 160), "webm", "libvpx")), "webm"),
        "one frame": (video_bytes(waves(1, 192, 160)), "mp4"),
    }


def write_shards(folder, files):
    """Write `folder/video` from [(key, data, ext)]."""
    with ShardWriter(folder / "video") as writer:
        for key, data, ext in files:
            writer.add(key, ext, data)
    return folder / "video"


def stream_of(folder, decoder, starts=(0.0,), sizes=SIZES, **options):
    shards = ShardFolder(folder)
    clips = [Clip(shards, i, start) for i in range(len(shards)) for start in starts]
    return VideoStream(clips, sizes, decoder[0], decoder[1], **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    files = [(name.replace(" ", "_").replace(".", ""), *file) for name, file in good_files().items()]
    return write_shards(tmp_path_factory.mktemp("videos"), files)


@pytest.fixture(scope="module")
def truth(folder):
    """Return the frames that the video modality reads, of every clip."""
    shards = ShardFolder(folder)
    return [video_frames(shards.read(i), shards.extensions[i], SIZES) for i in range(len(shards))]


# --- choice of frames, and pixels ---


def test_pyav_gives_what_the_modality_reads_bit_for_bit(folder, truth):
    for batch in stream_of(folder, ("pyav", CPU), batch_size=4, workers=2):
        for clip in batch:
            assert clip.decoder == "pyav" and np.array_equal(clip.frames, truth[clip.number])


@pytest.mark.parametrize("decoder", DECODERS[1:], indirect=True)
def test_dali_gives_the_same_pixels_within_the_stated_tolerance(decoder, folder, truth):
    """Check the tolerances of docs/video.md for downscaled pictures, in levels of 255. The padding is equal."""
    stream = stream_of(folder, decoder, batch_size=4)
    for clip in (clip for batch in stream for clip in batch):
        name, expected = list(good_files())[clip.number], truth[clip.number].astype(int)
        assert clip.frames.shape == expected.shape and clip.frames.dtype == np.uint8, name
        apart = np.abs(clip.frames - expected)
        # Full colours were clipped by the wrong matrix before the right one. Uncorrected: 32 at most, 6.4 in the mean.
        most, mean = (30, 2) if name == "BT.709" else (5, 1.5)
        assert apart.max() <= most and apart.mean() <= mean, (name, apart.max(), apart.mean())
        padding = (expected == 255).all((0, 2, 3)), (expected == 255).all((0, 1, 3))
        assert (clip.frames[:, padding[0]] == 255).all() and (clip.frames[:, :, padding[1]] == 255).all(), name
    if decoder[1] == CPU:
        assert stream.decoders == {"dali": len(good_files())}


@pytest.mark.parametrize("seed", range(3))
def test_frames_are_those_shown_at_the_asked_times(decoder, seed, tmp_path):
    """Compare with brute force at random times of random files, constant and varying rates."""
    rng = np.random.default_rng(seed)
    files, times = [], []
    for number in range(4):
        gaps = rng.choice([20, 35, 50, 110, 300], 39) if number % 2 else np.full(39, 70)
        times.append([0, *np.cumsum(gaps).tolist()])
        container = ("mp4", "webm")[number // 2]
        # With one keyframe, DALI takes every clip of the file; with more, those before the second.
        keyframes = str(rng.integers(2, 20) if number // 2 else 250)
        data = coded(levels(40), container, "libvpx-vp9", 1000, times=times[-1], g=keyframes)
        files.append((f"v{number}", data, container))
    starts = [0.0, *rng.uniform(0.1, 1.4, 3).round(4).tolist()]
    stream = stream_of(write_shards(tmp_path, files), decoder, starts, batch_size=5)
    seen = 0
    for clip in (clip for batch in stream for clip in batch):
        shown, start = times[clip.number // len(starts)], starts[clip.number % len(starts)]
        asked = [1000 * (start + k / SIZES.frame_rate) for k in range(SIZES.max_frames)]
        assert asked[-1] < shown[-1]
        assert numbers_of(clip.frames) == [max(f for f, t in enumerate(shown) if t <= at + 1) for at in asked]
        seen += 1
    assert seen == 16
    assert decoder[0] == "pyav" or stream.decoders["dali"] >= 8


def test_batches_threads_and_starts_change_no_bit(decoder, folder):
    def run(**options):
        return [d for batch in stream_of(folder, decoder, **options) for d in digests(batch)]

    whole = run(batch_size=len(good_files()), workers=1)
    assert [number for number, _ in whole] == list(range(len(good_files())))
    assert run(batch_size=1, workers=2) == whole
    assert run(batch_size=4, workers=3) == whole
    assert run(batch_size=3, workers=2, consumed=5) == whole[5:]
    assert run(consumed=len(good_files())) == []


@pytest.mark.parametrize("decoder", DECODERS[:2], indirect=True)
def test_a_killed_stream_goes_on_with_the_very_next_clip(decoder, folder):
    expected = [d for batch in stream_of(folder, decoder, batch_size=5) for d in digests(batch)]
    command = [sys.executable, Path(__file__).parent / "lib" / "video_worker.py", folder, decoder[0], "2", "2", "0"]
    process = warm.start(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen, state = [], 0
    for _ in range(3):  # the fourth batch is being decoded by then
        process.stdin.write("\n")
        process.stdin.flush()
        while (line := process.stdout.readline().split())[0] != "state":
            seen.append((int(line[0]), line[1]))
        state = int(line[1])
    process.kill()
    assert process.wait(60) == -9 and state == 6
    resumed = stream_of(folder, decoder, batch_size=3, workers=1, consumed=state)
    assert seen + [d for batch in resumed for d in digests(batch)] == expected


# --- seeking ---


class CountingContainer:
    """PyAV's container that counts the packets that are read, one for each frame."""

    def __init__(self, container, counts):
        self.container, self.counts = container, counts

    def seek(self, *args, **options):
        self.container.seek(*args, **options)

    def demux(self, stream):
        for packet in self.container.demux(stream):
            self.counts.append(packet.pts)
            yield packet


def test_a_clip_late_in_a_long_file_is_decoded_from_the_keyframe_before(monkeypatch):
    data = coded(levels(59, 64, 48).repeat(10, 0), g="40")  # 59 s
    with av.open(io.BytesIO(data)) as container:
        keys = [float(p.pts * p.time_base) for p in container.demux(video=0) if p.size and p.is_keyframe]
    counts = []

    @contextmanager
    def counting(data, extension):
        with original(data, extension) as (container, stream):
            yield CountingContainer(container, counts), stream

    plan = plan_clip(data, "mp4", 50.25, SIZES)
    original = video_clip.open_video
    monkeypatch.setattr(video_clip, "open_video", counting)
    frames = video_clip.decode_clip(data, "mp4", plan, 48)
    assert numbers_of(frames) == [int(50.25 + k / 7) for k in range(9)]
    before = max(key for key in keys if key <= 50.2)
    needed = round((50.25 + 8 / 7 - before) * 10)
    assert plan.skipped == round(before * 10)
    assert needed <= len(counts) <= needed + 5 < 60


@pytest.mark.parametrize("options", [{"g": "1"}, {"g": "2", "bf": "1"}, {"g": "7", "bf": "3"}, {"g": "250", "bf": "2"}])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_seeking_loses_no_frame_where_frames_are_reordered(options, container):
    frames = levels(50, 64, 48)
    data = coded(frames, container, **options)
    extension = {"mp4": "mp4", "matroska": "mkv"}[container]
    for start in (0.0, 0.1, 0.65, 2.0, 3.3, 4.9):
        plan = plan_clip(data, extension, start, SIZES)
        asked = [start + k / 7 + 1e-3 for k in range(9) if start + k / 7 + 1e-3 < 5]
        expected = [int(at * 10) for at in asked][: 1 + (len(asked) - 1) // 4 * 4]
        assert numbers_of(video_clip.decode_clip(data, extension, plan, 48)) == expected


def test_a_clip_after_the_end_is_unreadable():
    with pytest.raises(UnreadableMedia, match=r"starts at 3 s, but the video ends at 1\.20 s"):
        plan_clip(plain(), "mp4", 3.0, SIZES)


# --- broken files ---


def damaged(data):
    """Overwrite the second frame's data with bytes that no decoder takes for a frame."""
    with av.open(io.BytesIO(data)) as container:
        packet = [p for p in container.demux(video=0) if p.size][1]
        return data[: packet.pos] + b"\xff" * packet.size + data[packet.pos + packet.size :]


@cache
def broken_files():
    tall, _ = good_files()["tall"]
    return {
        "cut": (tall[: len(tall) * 2 // 3], "webm", "truncated"),
        "headless": (plain()[: len(plain()) // 2], "mp4", "broken mp4"),
        "empty": (b"", "mp4", "zero bytes"),
        "text": (b"<html>not found</html>" * 50, "webm", "neither MP4"),
        "misnamed": (tall, "mp4", "extension .mp4"),
        "overwritten": (damaged(plain()), "mp4", ""),
    }


def mixed(good_first):
    """Return broken files among good ones."""
    files = [(name, *file[:2]) for name, file in broken_files().items()]
    files.insert(3, ("good1", *good_files()["varying"]))
    return [("good0", plain(), "mp4"), *files] if good_first else [*files, ("good0", plain(), "mp4")]


@pytest.mark.parametrize("good_first", [True, False])
def test_broken_files_are_named_and_the_others_are_untouched(decoder, good_first, tmp_path, caplog):
    files = mixed(good_first)
    names = [name for name, *_ in files]
    alone = stream_of(write_shards(tmp_path / "good", [f for f in files if f[0] not in broken_files()]), decoder)
    expected = [digest for batch in alone for _, digest in digests(batch)]
    with caplog.at_level(logging.WARNING):
        stream = stream_of(write_shards(tmp_path / "all", files), decoder, batch_size=3, max_broken=0.8)
        found = [d for batch in stream for d in digests(batch)]
    assert [digest for _, digest in found] == expected
    assert [names[n] for n, _ in found] == [name for name in names if name not in broken_files()]
    assert {names[b.number]: b.why for b in stream.broken}.keys() == broken_files().keys()
    for clip in stream.broken:
        assert broken_files()[names[clip.number]][2] in clip.why
        assert f"{names[clip.number]}: {clip.why}" in caplog.text
    assert stream.state() == len(files)


def test_more_broken_files_than_allowed_end_it_with_a_line(decoder, tmp_path):
    folder = write_shards(tmp_path, mixed(True))
    with pytest.raises(UserError, match=r"of 8 videos are broken, the limit is 50\.0%: .*cut: truncated"):
        list(stream_of(folder, decoder, batch_size=2, max_broken=0.5))
    with pytest.raises(UserError, match="1 of 8 videos are broken"):
        list(stream_of(folder, decoder, batch_size=2))


@needs_dali
def test_what_dali_cannot_take_goes_through_pyav_and_is_said(tmp_path, caplog):
    h264 = video_bytes(waves(9, 192, 160), codec="libx264")
    folder = write_shards(tmp_path, [("a", plain(), "mp4"), ("b", h264, "mp4"), ("c", h264, "mp4")])
    with caplog.at_level(logging.WARNING):
        stream = stream_of(folder, ("dali", CPU))
        (batch,) = list(stream)
    assert [clip.decoder for clip in batch] == ["dali", "pyav", "pyav"] and stream.decoders == {"dali": 1, "pyav": 2}
    assert np.array_equal(batch[1].frames, video_frames(h264, "mp4", SIZES))
    assert caplog.text.count("DALI does not decode h264 on a CPU") == 1


@needs_dali
def test_dalis_failure_is_one_error_and_the_next_batch_works():
    decoder = DaliDecoder(48, CPU, batch_size=2, threads=1)
    plan = plan_clip(plain(), "mp4", 0, SIZES)
    good = decoder.decode([(plain(), plan)])[0]
    with pytest.raises(UnreadableMedia, match=r"^DALI: .*Failed to send packet to decoder: Invalid data"):
        decoder.decode([(plain(), plan), (damaged(plain()), plan)])
    assert np.array_equal(decoder.decode([(plain(), plan), (plain(), plan)])[1], good)


def test_what_dali_would_decode_wrongly_is_an_obstacle():
    plan = plan_clip(plain(), "mp4", 0, SIZES)
    gpu = torch.device("meta")  # any device but a CPU
    assert obstacle(plan, CPU) is None and obstacle(plan, gpu) is None
    for changed, on_cpu, on_gpu in (
        ({"codec": "h264"}, "h264 on a CPU", None),
        ({"codec": "theora"}, "theora on a CPU", "theora on a GPU"),
        ({"pixel_format": "yuv444p"}, None, "pixel format"),
        ({"pixel_format": "yuv420p10le"}, "pixel format", "pixel format"),
        ({"colour_matrix": 8}, "colour matrix 8", "colour matrix 8"),
        ({"has_cuts": True}, "edit list", "edit list"),
        ({"skipped": 24}, "late in its file", "late in its file"),
    ):
        for place, expected in ((CPU, on_cpu), (gpu, on_gpu)):
            found = obstacle(dataclasses.replace(plan, **changed), place)
            assert found == expected or expected in found


# --- the choice, and the token cache ---


def test_the_decoder_is_chosen_by_device_and_logged(monkeypatch, caplog):
    gpu = torch.device("meta")
    with caplog.at_level(logging.INFO):
        assert choose_decoder("auto", CPU) == "pyav" and "PyAV: on a CPU" in caplog.text
        monkeypatch.setattr(video_stream, "_has_dali", lambda: True)
        assert choose_decoder("auto", gpu) == "dali" and "with DALI" in caplog.text
        assert choose_decoder("pyav", gpu) == "pyav" and "PyAV: requested" in caplog.text
        monkeypatch.setattr(video_stream, "_has_dali", lambda: False)
        assert choose_decoder("auto", gpu) == "pyav" and "is not installed" in caplog.text
    with pytest.raises(UserError, match="DALI is not installed"):
        choose_decoder("dali", CPU)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "downsample": 16, "width": 16, "encoder_depth": 0, "decoder_depth": 0, "max_frames": 9}
    save_codec(VisualCodec(VisualCodecConfig(**sizes)), folder)
    return folder


@pytest.fixture
def source(tmp_path):
    with ShardWriter(tmp_path / "shards" / "train" / "video") as writer:
        for n in range(5):
            writer.add(f"v{n}", "mp4", b"broken" if n == 2 else video_bytes(shape_video(n, 9)))
    return tmp_path / "shards"


def tokenize_command(source, codec, *options):
    return CliRunner().invoke(app, ["data", "tokenize", str(source), "--codec", f"visual={codec}", *options])


@pytest.mark.parametrize("name", ["pyav", pytest.param("dali", marks=needs_dali)])
def test_tokenizing_says_what_decoded_and_what_was_left_out(name, source, codec):
    options = ("--device", "cpu", "--video-decoder", name, "--max-broken", "0.2")
    result = tokenize_command(source, codec, *options)
    assert result.exit_code == 0, result.output
    modality = VideoModality.load(codec)
    cache = source / "train" / cache_name(modality)
    record = json.loads((cache / "decoding.json").read_text())
    assert record == {"decoders": {name: 4}, "broken": {"v2": "neither MP4 (QuickTime) nor Matroska (WebM)"}}
    tokens = ShardFolder(cache)
    assert tokens.keys == ["v0", "v1", "v3", "v4"]
    if name == "pyav":
        frames = modality.read_media(video_bytes(shape_video(3, 9)), "mp4")
        ids = np.load(io.BytesIO(tokens.read(2)))
        assert np.array_equal(ids, modality.encode([frames])[0])
    assert "(kept)" in tokenize_command(source, codec, *options).output
    other = {"pyav": "dali", "dali": "pyav"}[name]
    refused = tokenize_command(source, codec, "--video-decoder", other)
    assert isinstance(refused.exception, UserError) and f"decoded with {name}, not {other}" in str(refused.exception)
    (cache / "decoding.json").write_text("{")
    assert "unreadable decoding.json" in str(tokenize_command(source, codec).exception)


def test_a_broken_video_is_an_error_unless_some_may_be(source, codec):
    failed = tokenize_command(source, codec)
    assert "1 of 5 videos are broken, the limit is 0.0%" in str(failed.exception)
    assert [p.name for p in (source / "train").iterdir()] == ["video"]


def test_a_broken_part_of_an_ordered_document_is_an_error(tmp_path, codec):
    with ShardWriter(tmp_path / "s" / "train" / "video") as writer:
        writer.add("page", "1.mp4", video_bytes(shape_video(1, 9)))
        writer.add("page", "3.mp4", b"broken")
    failed = tokenize_command(tmp_path / "s", codec, "--max-broken", "0.9")
    assert "page.3, part of a document" in str(failed.exception)
