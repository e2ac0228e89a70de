"""A contact sheet: one HTML page with the prompt and the output of every request, to look at what was made."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from megamm.inference.generate_files import Medium, Request

_HEAD = """<!doctype html>
<meta charset="utf-8">
<title>Generated media</title>
<style>
body { font-family: sans-serif; display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #ccc; padding: 0.5rem }
img, video, audio { max-width: 100%; image-rendering: pixelated }
pre { white-space: pre-wrap }
</style>
"""
_LONGEST_TEXT = 2000
"""Characters of a generated text that are shown."""


def write_contact_sheet(requests: Sequence[Request], page: Path) -> None:
    """Write the page; it refers to the outputs by paths relative to its own folder. It gets its name when complete."""
    figures = [_figure(request, page.parent) for request in requests]
    partial = page.with_name(f".{page.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(_HEAD + "\n".join(figures) + "\n", encoding="utf-8")
    partial.rename(page)


def _figure(request: Request, folder: Path) -> str:
    link = quote(os.path.relpath(request.out, folder))
    if request.target == "text":
        text = request.out.read_text(encoding="utf-8", errors="replace")[:_LONGEST_TEXT]
        shown = f"<pre>{escape(text)}</pre>"
    elif request.target == "image":
        shown = f'<a href="{link}"><img alt="" loading="lazy" src="{link}"></a>'
    elif request.target in ("audio", "video"):
        shown = f'<{request.target} controls preload="none" src="{link}"></{request.target}>'
    else:
        shown = ""
    prompt = " + ".join(_described(part) for part in request.prompt)
    name = f'<a href="{link}">{escape(request.out.name)}</a>'
    return f"<figure>{shown}<figcaption>{prompt} &rarr; {request.target} {name}</figcaption></figure>"


def _described(part: Medium) -> str:
    if part.modality == "text" and part.where.startswith("prompt "):
        return escape(part.data.decode("utf-8", "replace"))
    return escape(Path(part.where).name)
