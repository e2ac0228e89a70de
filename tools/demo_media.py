"""Media of every modality as self-contained HTML: what a page can show of a medium, as data URIs.

A medium is what its modality's `read_media` and `decode` give: str; uint8 `[Y, X, 3]`; float32 `[samples]` at
`sample_rate` Hz; uint8 `[F, Y, X, 3]`; float32 `[N, 9]` points (xyz, normal, colour).
"""

import base64
import io
from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from megamm.data.render3d import render
from megamm.modalities.base import Modality

STRIP = 6
"""Frames of a video that its strip shows."""
ANGLES = (30.0, 120.0)
"""Degrees from which a point cloud is shown."""


def uri(kind: str, data: bytes) -> str:
    """A data URI of media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(pixels: np.ndarray, alt: str) -> str:
    """uint8 `[Y, X, 3]` as an <img>."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f'<img class="pixels" src="{uri("image/png", file.getvalue())}" alt="{escape(alt, quote=True)}">'


def _text(modality: Modality, medium: str, alt: str) -> str:
    return f'<p class="said">{escape(medium.strip())}</p>'


def _image(modality: Modality, medium: np.ndarray, alt: str) -> str:
    return picture(medium, alt)


def _audio(modality: Any, medium: np.ndarray, alt: str) -> str:
    """A player over a spectrogram (dB of a 32 ms Hann window, 80 dB deep)."""
    rate = modality.codec.sample_rate
    figure = Figure(figsize=(3.2, 1.2), layout="constrained")
    axes = figure.add_subplot()
    window = int(0.032 * rate)
    padded = np.pad(medium, (0, max(0, 2 * window - len(medium))))
    power, *_ = axes.specgram(padded + 1e-9, NFFT=window, noverlap=window * 3 // 4, Fs=rate)
    peak = 10 * np.log10(power.max())
    axes.images[0].set_clim(peak - 80, peak)
    axes.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    shown = f'<img class="plot" src="{uri("image/png", file.getvalue())}" alt="{escape(alt, quote=True)}">'
    return f'{shown}<audio controls src="{uri("audio/flac", modality.write_media(medium))}"></audio>'


def _video(modality: Modality, medium: np.ndarray, alt: str) -> str:
    """A strip of frames, evenly spread over the clip, and a player."""
    chosen = medium[np.linspace(0, len(medium) - 1, min(STRIP, len(medium))).round().astype(int)]
    player = f'<video controls loop muted src="{uri("video/mp4", modality.write_media(medium))}"></video>'
    return picture(np.concatenate(list(chosen), axis=1), alt) + player


def _points(modality: Modality, medium: np.ndarray, alt: str) -> str:
    return picture(np.concatenate([render(medium, angle, 128) for angle in ANGLES], axis=1), alt)


SHOW: dict[str, Callable[[Any, Any, str], str]] = {
    "text": _text,
    "image": _image,
    "audio": _audio,
    "video": _video,
    "points": _points,
}


def show(modality: Modality, medium: Any, alt: str) -> str:
    """One medium as HTML."""
    return SHOW[modality.name](modality, medium, alt)
