"""Video decoding on a CPU: megamm against torchcodec, decord and plain PyAV; DALI against Pillow and soundfile.

Every side gets the same bytes, takes the same frames (those shown at 0, 1/8, ... s, 17 at most) and returns the same
squares (64 pixels, aspect kept, padded with white, antialiased); the peers scale with Pillow as megamm does. One thread
each, in turns over rounds; medians of frames/s of wall time and of CPU time (user + system, all threads).
The peers are not in the requirements files. torchcodec and decord:
`pip install torchcodec==0.13.0 decord==0.6.0 --no-deps`; torchcodec loads FFmpeg's shared libraries (Debian:
`apt-get install libavdevice59 libavfilter8`). A side that cannot run is named with the reason.
Run: `python benchmarks/video.py [--json OUT]`.
"""

import argparse
import importlib
import io
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from megamm import __version__
from megamm.config.accelerators import installed
from megamm.media.image_file import pad_to_square, square_pixels
from megamm.media.video_clip import decode_clip, plan_clip
from megamm.media.video_dali import DaliDecoder, obstacle
from megamm.media.video_file import sampled_frames
from megamm.modalities.protocol import CPU

Frames = npt.NDArray[np.uint8]
Side = Callable[[list[bytes]], list[Frames]]
SIZES = SimpleNamespace(image_size=64, frame_rate=8.0, max_frames=17, frames_per_step=4)
THREADS = 1


def picture_video(codec: str, width: int, height: int, frames: int, seed: int) -> bytes:
    """Return moving coloured waves with noise at 24 Hz, in mp4."""
    import av

    rng, file = np.random.default_rng(seed), io.BytesIO()
    y, x = np.mgrid[:height, :width].astype(np.float32)
    noise = rng.normal(0, 6, (height, width, 3)).astype(np.float32)
    phase = rng.uniform(0, 6, 3)
    with av.open(file, "w", format="mp4") as out:
        fast = {"preset": "fast"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8", "b": "4M"}
        stream: Any = out.add_stream(codec, rate=24, options=fast)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            planes = [x / width * 6 + t / 9 + phase[0], y / height * 5 - t / 7 + phase[1], (x + y) / width + phase[2]]
            pixels = 127 + 100 * np.sin(np.stack(planes, -1)) + np.roll(noise, t, 1)
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def squares(frames: Frames) -> Frames:
    """Convert `[F, Y, X, 3]` to squares as megamm makes them."""
    return np.stack([pad_to_square(Image.fromarray(f), SIZES.image_size) for f in frames])


def peer(module: str) -> Any:
    """Import a package that is not in setup.py. Raises ImportError, or an error of its libraries, if it is unusable."""
    return importlib.import_module(module)


def ours_pyav() -> Side:
    """Call megamm.media.video_clip as VideoStream does."""

    def run(files: list[bytes]) -> list[Frames]:
        plans = [plan_clip(data, "mp4", 0.0, SIZES) for data in files]
        return [decode_clip(data, "mp4", plan, SIZES.image_size) for data, plan in zip(files, plans, strict=True)]

    return run


def ours_dali() -> Side:
    """Call megamm.media.video_dali on the CPU, one batch at a time."""
    decoder = DaliDecoder(SIZES.image_size, CPU, batch_size=16, threads=THREADS)

    def run(files: list[bytes]) -> list[Frames]:
        plans = [plan_clip(data, "mp4", 0.0, SIZES) for data in files]
        if reason := next((r for r in (obstacle(plan, CPU) for plan in plans) if r), None):
            raise NotImplementedError(reason)
        return decoder.decode(list(zip(files, plans, strict=True)))

    return run


def plain_pyav() -> Side:
    """Decode as a user would: in order, keep a frame when its time has come, stop after the last."""
    import av

    def one(data: bytes) -> Frames:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = THREADS
            kept: list[Frames] = []
            for frame in container.decode(stream):
                while len(kept) < SIZES.max_frames and frame.time + 1 / 24 > len(kept) / SIZES.frame_rate + 1e-3:
                    kept.append(pad_to_square(frame.to_image(), SIZES.image_size))
                if len(kept) == SIZES.max_frames:
                    break
        return np.stack(kept)

    return lambda files: [one(data) for data in files]


def with_torchcodec() -> Side:
    """Use torchcodec's decoder (approximate seeking, the faster mode), frames by time."""
    video_decoder = peer("torchcodec.decoders").VideoDecoder

    def one(data: bytes) -> Frames:
        decoder = video_decoder(data, dimension_order="NHWC", num_ffmpeg_threads=THREADS, seek_mode="approximate")
        seconds = decoder.metadata.duration_seconds
        times = [k / SIZES.frame_rate + 1e-3 for k in range(SIZES.max_frames)]
        return squares(decoder.get_frames_played_at([t for t in times if t < seconds]).data.numpy())

    return lambda files: [one(data) for data in files]


def with_decord() -> Side:
    """Use decord's reader, frames by their timestamps."""
    decord = peer("decord")

    def one(data: bytes) -> Frames:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=THREADS)
        spans = reader.get_frame_timestamp(range(len(reader)))
        chosen = sampled_frames(spans[:, 0].tolist(), float(spans[-1, 1]), SIZES.frame_rate, SIZES.max_frames)
        return squares(reader.get_batch(chosen).asnumpy())

    return lambda files: [one(data) for data in files]


SIDES: dict[str, Callable[[], Side]] = {
    "megamm, PyAV": ours_pyav,
    "megamm, DALI on the CPU": ours_dali,
    "PyAV": plain_pyav,
    "torchcodec": with_torchcodec,
    "decord": with_decord,
}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(run: Callable[[], int]) -> tuple[float, float]:
    """Return (items per second of wall time, per second of CPU time); run returns its number of items."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    items = run()
    return items / (time.perf_counter() - wall), items / (cpu_seconds() - cpu)


def compare(sides: dict[str, Callable[[], int]], rounds: int, unit: str) -> dict[str, Any]:
    """Run sides in turns: medians, and the ratio to the first side's CPU figure of the same round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            taken[name].append(timed(run))
    first = [cpu for _, cpu in next(iter(taken.values()))]
    table: dict[str, Any] = {}
    for name, figures in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        ratio = statistics.median(f[1] / reference for f, reference in zip(figures, first, strict=True))
        table[name] = {f"{unit}_per_s": wall, f"{unit}_per_cpu_s": cpu, "ratio_per_cpu_s": ratio}
        print(f"  {name:<26} {wall:>8.0f} {unit}/s {cpu:>8.0f} per CPU-s   {ratio:.2f}")
    return table


def frames_of(side: Side, files: list[bytes]) -> int:
    return sum(len(frames) for frames in side(files))


def usable(files: list[bytes], missing: dict[str, str]) -> dict[str, Callable[[], int]]:
    """Return the sides that run here and give the first one's frames; the others' reasons are put into `missing`."""
    running: dict[str, Callable[[], int]] = {}
    expected: list[Frames] = []
    for name, build in SIDES.items():
        try:
            side = build()
            given = side(files)
        except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            missing[name] = lines[0][:160]
            print(f"  {name}: {missing[name]}")
            continue
        expected = expected or given
        apart = [np.abs(a.astype(int) - b).mean() for a, b in zip(expected, given, strict=True)]
        assert max(apart) < 3, f"{name} gives other frames: {max(apart):.1f} levels apart in the mean"
        running[name] = partial(frames_of, side, files)
    return running


def videos(rounds: int) -> dict[str, Any]:
    """Measure each kind of clips with every side."""
    kinds = {
        "H.264 1280x720, 3 s": ("libx264", 1280, 720, 72, 2),
        "VP9 1280x720, 3 s": ("libvpx-vp9", 1280, 720, 72, 2),
        "H.264 160x128, 3 s": ("libx264", 160, 128, 72, 8),
        "VP9 160x128, 3 s": ("libvpx-vp9", 160, 128, 72, 8),
    }
    result = {}
    for kind, (codec, width, height, frames, count) in kinds.items():
        files = [picture_video(codec, width, height, frames, seed) for seed in range(count)]
        print(f"{kind}, {count} clips, {SIZES.max_frames} frames each", flush=True)
        missing: dict[str, str] = {}
        result[kind] = compare(usable(files, missing), rounds, "frames") | {"not run": missing}
    return result


def seeking(rounds: int) -> dict[str, Any]:
    """Measure milliseconds for clips at 50 s and at the start of a 60 s file, with frames planned and decoded."""
    data = picture_video("libvpx-vp9", 160, 128, 24 * 60, 0)
    decoder = DaliDecoder(SIZES.image_size, CPU, batch_size=1, threads=THREADS)
    result: dict[str, Any] = {}
    for start in (0.0, 50.0):
        plan = plan_clip(data, "mp4", start, SIZES)
        sides: dict[str, Callable[[], Any]] = {
            "plan": partial(plan_clip, data, "mp4", start, SIZES),
            "PyAV": partial(decode_clip, data, "mp4", plan, SIZES.image_size),
            "DALI on the CPU": partial(decoder.decode, [(data, plan)]),
        }
        for name, run in sides.items():
            took = []
            for _ in range(rounds):
                begin = time.perf_counter()
                run()
                took.append(1e3 * (time.perf_counter() - begin))
            result.setdefault(name, {})[f"from {start:g} s"] = statistics.median(took)
    for name, row in result.items():
        print(f"  {name:<26} " + "  ".join(f"{where}: {ms:.1f} ms" for where, ms in row.items()))
    return result


def dali_of(fill: Callable[[Any, Any, Any], Any], batch: int) -> Callable[[list[bytes]], Any]:
    """Return a pipeline of one external source and what `fill(fn, types, encoded)` adds."""
    from nvidia import dali

    fn: Any = dali.fn
    types: Any = dali.types
    pipeline = dali.Pipeline(batch, THREADS, None, prefetch_queue_depth=1, exec_pipelined=False, exec_async=False)
    with pipeline:
        pipeline.set_outputs(fill(fn, types, fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)))
    pipeline.build()

    def run(files: list[bytes]) -> Any:
        pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in files])
        return pipeline.run()

    return run


def images(rounds: int) -> dict[str, Any]:
    """Decode JPEG and PNG of 512 x 384 to squares of 64 pixels: Pillow as in the image modality, and DALI."""

    def fill(fn: Any, types: Any, encoded: Any) -> Any:
        decoded = fn.decoders.image(encoded)
        scaled = fn.resize(decoded, size=[48, 64], interp_type=types.INTERP_LANCZOS3)
        return fn.crop(scaled, crop=[64, 64], out_of_bounds_policy="pad", fill_values=255)

    y, x = np.mgrid[:384, :512]
    result = {}
    for ending, format_ in (("jpg", "JPEG"), ("png", "PNG")):
        files = []
        for n in range(16):
            pixels = np.stack([(x * 2 + n * 9) % 256, (y * 3 + n) % 256, (x + y) % 256], -1).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format=format_)
            files.append(file.getvalue())
        run_dali = dali_of(fill, len(files))

        def pillow(files: list[bytes] = files, ending: str = ending) -> int:
            return len([square_pixels(data, ending, 64) for data in files])

        def dali(files: list[bytes] = files, run: Callable[[list[bytes]], Any] = run_dali) -> int:
            return len(files) if run(files) else 0

        print(f"{format_} 512x384 to 64x64, batches of {len(files)}")
        result[format_] = compare({"megamm, Pillow": pillow, "DALI on the CPU": dali}, rounds, "images")
    return result


def sounds(rounds: int) -> dict[str, Any]:
    """Decode FLAC and Ogg Vorbis of 3 s at 16 kHz to float32: soundfile and DALI."""
    import soundfile

    wave = np.sin(np.arange(48_000) / 20 + np.sin(np.arange(48_000) / 3000)).astype(np.float32) / 2
    result = {}
    for format_ in ("FLAC", "OGG"):
        file = io.BytesIO()
        soundfile.write(file, wave, 16_000, format=format_)
        files = [file.getvalue()] * 16
        run_dali = dali_of(lambda fn, types, e: fn.decoders.audio(e, dtype=types.FLOAT, downmix=True)[0], len(files))

        def plain(files: list[bytes] = files) -> int:
            return len([soundfile.read(io.BytesIO(data), dtype="float32") for data in files])

        def dali(files: list[bytes] = files, run: Callable[[list[bytes]], Any] = run_dali) -> int:
            return len(files) if run(files) else 0

        print(f"{format_} 3 s, batches of {len(files)}")
        result[format_] = compare({"soundfile": plain, "DALI on the CPU": dali}, rounds, "clips")
    return result


def found(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    packages = {name: found(name) for name in ("av", "torchcodec", "decord", "pillow", "soundfile")}
    result: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "megamm": __version__}
    result |= {
        "packages": packages | {"DALI": installed().dali or "not installed"},
        "rounds": options.rounds,
        "threads": THREADS,
    }
    result["videos"] = videos(options.rounds)
    print("a clip in a file of 60 s, VP9 160x128")
    result["seeking, ms"] = seeking(options.rounds)
    result["images"] = images(options.rounds)
    result["sounds"] = sounds(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
