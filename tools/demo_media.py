"""Media of every modality as self-contained HTML, with data URIs.

A medium is what its modality's `read_media` and `decode` return: str; uint8 `[Y, X, 3]`; float32 `[samples]` at
`sample_rate` Hz; uint8 `[F, Y, X, 3]`; float32 `[N, 9]` points (xyz, normal, colour). Every picture has a fixed width
of at least `LEAST` CSS pixels, a whole multiple of its own, and is never scaled down by its column.
"""

import base64
import io
import math
from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from megamm.media.point_clouds import render
from megamm.modalities.protocol import Modality

LEAST = 96
"""Minimum width of every picture in CSS pixels."""
PICTURE, VIEW, PLAYER = 144, 144, 192
"""Minimum CSS pixels of an image, of a view of a point cloud, and of a video's player."""
CLIP, CLIP_HEIGHT = 240, 84
"""CSS pixels of a spectrogram, and of its player."""
FRAMES, IN_A_ROW = 6, 3
"""Frames of a video that are shown, and how many of them side by side."""
ANGLES = (30.0, 120.0)
"""Degrees from which a point cloud is shown."""
STYLE = f"""
.pixels {{ image-rendering: pixelated; border: 1px solid var(--line); display: block }}
.clip {{ width: {CLIP}px; max-width: 100% }} .clip img, .clip audio {{ width: 100%; display: block }}
.clip audio {{ height: 2.4rem; margin-top: .3rem }}
.views, .frames, .video {{ display: flex; flex-wrap: wrap; gap: 4px; align-items: flex-start }}
.said {{ margin: 0; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere }}
@media print {{ audio, video {{ display: none !important }} }}
"""


def uri(kind: str, data: bytes) -> str:
    """Return a data URI of media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def scaled(pixels: int, least: int) -> int:
    """Return the smallest whole multiple of `pixels` that is not below `least`."""
    return pixels * math.ceil(least / pixels)


def picture(pixels: np.ndarray, alt: str, least: int = PICTURE) -> str:
    """Return uint8 `[Y, X, 3]` as an <img>, at least `least` CSS pixels wide."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    height, width = pixels.shape[:2]
    shown = scaled(width, least)
    size = f'width="{shown}" height="{height * shown // width}"'
    return f'<img class="pixels" {size} src="{uri("image/png", file.getvalue())}" alt="{escape(alt, quote=True)}">'


def _text(modality: Modality, medium: str, alt: str) -> str:
    return f'<p class="said">{escape(medium.strip())}</p>'


def _image(modality: Modality, medium: np.ndarray, alt: str) -> str:
    return picture(medium, alt)


def _audio(modality: Any, medium: np.ndarray, alt: str) -> str:
    """Return a player under a spectrogram (dB of a 32 ms Hann window, 80 dB deep; time to the right, pitch upwards)."""
    rate = modality.codec.sample_rate
    figure = Figure(figsize=(CLIP / 80, CLIP_HEIGHT / 80))
    axes = figure.add_axes((0, 0, 1, 1))
    window = int(0.032 * rate)
    padded = np.pad(medium, (0, max(0, 2 * window - len(medium))))
    with np.errstate(divide="ignore"):  # silence would be minus infinity
        power, *_ = axes.specgram(padded + 1e-9, NFFT=window, noverlap=window * 3 // 4, Fs=rate)
    peak = 10 * np.log10(power.max())
    axes.images[0].set_clim(peak - 80, peak)
    axes.set_axis_off()
    axes.margins(0)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    label = escape(alt, quote=True)
    size = f'width="{CLIP}" height="{CLIP_HEIGHT}"'
    shown = f'<img {size} src="{uri("image/png", file.getvalue())}" alt="spectrogram of {label}">'
    sound = uri("audio/flac", modality.write_media(medium))
    return f'<div class="clip">{shown}<audio controls aria-label="{label}" src="{sound}"></audio></div>'


def _video(modality: Modality, medium: np.ndarray, alt: str) -> str:
    """Return a player, and frames evenly spread over the clip."""
    height, width = medium.shape[1:3]
    chosen = medium[np.linspace(0, len(medium) - 1, min(FRAMES, len(medium))).round().astype(int)]
    frames = "".join(picture(frame, f"{alt}, frame {i}", LEAST) for i, frame in enumerate(chosen, start=1))
    room = IN_A_ROW * (scaled(width, LEAST) + 4)
    shown = scaled(width, PLAYER)
    size = f'width="{shown}" height="{height * shown // width}"'
    film = uri("video/mp4", modality.write_media(medium))
    label = escape(alt, quote=True)
    player = f'<video class="pixels" controls loop muted {size} aria-label="{label}" src="{film}"></video>'
    return f'<div class="video">{player}<div class="frames" style="max-width:{room}px">{frames}</div></div>'


def _points(modality: Modality, medium: np.ndarray, alt: str) -> str:
    views = (picture(render(medium, angle, VIEW), f"{alt}, from {angle:.0f} degrees", VIEW) for angle in ANGLES)
    return f'<div class="views">{"".join(views)}</div>'


SHOW: dict[str, Callable[[Any, Any, str], str]] = {
    "text": _text,
    "image": _image,
    "audio": _audio,
    "video": _video,
    "points": _points,
}


def show(modality: Modality, medium: Any, alt: str) -> str:
    """Return one medium as HTML."""
    return SHOW[modality.name](modality, medium, alt)
