"""A tiny medium and an untrained codec of every registered modality, different for each number, and deterministic."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from codec_data import as_bytes, shape_picture

from megamm.modalities import REGISTRY, tokenizer_names
from megamm.tokenizers.audio.model import AudioCodec, AudioCodecConfig
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.points.model import PointsCodec, PointsCodecConfig
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig


def _text(number: int) -> tuple[bytes, str]:
    return f"{shape_picture(number)[1]} number {number}".encode(), "txt"


def _image(number: int) -> tuple[bytes, str]:
    return as_bytes(shape_picture(number)[0]), "png"


def _audio(number: int) -> tuple[bytes, str]:
    """Return a fading tone of a fifth of a second or more."""
    import soundfile

    seconds = np.arange(3200 + 160 * (number % 5)) / 16_000
    wave = 0.5 * np.sin(2 * np.pi * (200 + 37 * number) * seconds) * np.exp(-3 * seconds)
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format="FLAC")
    return file.getvalue(), "flac"


def _video(number: int) -> tuple[bytes, str]:
    """Return a shape that moves to the right, five frames or more at 8 Hz."""
    import av

    still = np.asarray(shape_picture(number)[0])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libvpx-vp9", rate=8)
        stream.width, stream.height, stream.pix_fmt = still.shape[1], still.shape[0], "yuv420p"
        for k in range(5 + number % 3):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 2 * k, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue(), "mp4"


def _points(number: int) -> tuple[bytes, str]:
    """Return an ellipsoid of one colour."""
    rng = np.random.default_rng(number)
    normal = rng.standard_normal((600, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    colour = np.broadcast_to(rng.random(3), normal.shape)
    cloud = np.concatenate([normal * rng.uniform(0.3, 2.0, 3), normal, colour], axis=1).astype(np.float32)
    file = io.BytesIO()
    np.savez(file, points=cloud)
    return file.getvalue(), "npz"


_EXAMPLES: dict[str, Callable[[int], tuple[bytes, str]]] = {
    "text": _text,
    "image": _image,
    "audio": _audio,
    "video": _video,
    "points": _points,
}


def example(name: str, number: int) -> tuple[bytes, str]:
    """Return (bytes, extension) of a medium of this modality; a test's own modality has an `example`."""
    make = _EXAMPLES.get(name) or REGISTRY[name].example  # type: ignore[attr-defined]
    return make(number)


def _text_codec(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def _visual_codec(folder: Path) -> None:
    save_codec(
        VisualCodec(VisualCodecConfig(image_size=16, downsample=8, max_frames=5, width=16, levels=(5, 5))), folder
    )


def _audio_codec(folder: Path) -> None:
    sizes = {"stride": 8, "codebooks": 2, "levels": (5, 5), "width": 16, "encoder_depth": 1, "decoder_depth": 1}
    save_codec(AudioCodec(AudioCodecConfig(mels=20, **sizes)), folder)


def _points_codec(folder: Path) -> None:
    config = PointsCodecConfig(points=64, patches=4, cells=4, width=16, decoder_depth=1, levels=(5, 5))
    save_codec(PointsCodec(config), folder)


_CODECS: dict[str, Callable[[Path], None]] = {
    "text": _text_codec,
    "visual": _visual_codec,
    "audio": _audio_codec,
    "points": _points_codec,
}


def make_codecs(folder: Path) -> dict[str, Path]:
    """Write folder/<name>/ with untrained weights from one seed, for every name of the registry."""
    for name in tokenizer_names():
        (folder / name).mkdir(parents=True)
        torch.manual_seed(0)
        owner = next(m for m in REGISTRY.values() if m.tokenizer_name == name)
        make = _CODECS.get(name) or owner.make_codec  # type: ignore[attr-defined]
        make(folder / name)
    return {name: folder / name for name in tokenizer_names()}
