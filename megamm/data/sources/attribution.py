"""ATTRIBUTION.md beside the media of a source: origin and licence, which the licences require to be passed on."""

from collections.abc import Iterable
from pathlib import Path

FILE = "ATTRIBUTION.md"


def write_attribution(target: Path, about: str, unpacked: Path, packages: Iterable[str]) -> None:
    """Start target/ATTRIBUTION.md with a line about the source and its Debian packages' full copyright files."""
    text = f"# {target.name}\n\n{about}\n"
    for package in packages:
        folder = unpacked / "usr/share/doc" / package
        if folder.is_symlink():  # another package of the source provides the notice
            continue
        notice = (folder / "copyright").read_text(encoding="utf-8", errors="replace").rstrip()
        text += f"\nFrom the Debian package `{package}`:\n\n```\n{notice}\n```\n"
    (target / FILE).write_text(text, encoding="utf-8")


def append_credits(target: Path, lines: Iterable[str]) -> None:
    """Add a paragraph to the attribution of the source being written to `target`, such as the names of authors."""
    with (target / FILE).open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(lines) + "\n")
