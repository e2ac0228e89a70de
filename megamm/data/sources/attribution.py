"""ATTRIBUTION.md beside the media of a source: origin and licence, which the licences ask to travel with them."""

from collections.abc import Iterable
from pathlib import Path

FILE = "ATTRIBUTION.md"


def write_attribution(target: Path, about: str, unpacked: Path, packages: Iterable[str]) -> None:
    """Begin target/ATTRIBUTION.md with a line about the source and its Debian packages' copyright files in full."""
    text = f"# {target.name}\n\n{about}\n"
    for package in packages:
        folder = unpacked / "usr/share/doc" / package
        if folder.is_symlink():  # the notice is that of another package of the source
            continue
        notice = (folder / "copyright").read_text(encoding="utf-8", errors="replace").rstrip()
        text += f"\nFrom the Debian package `{package}`:\n\n```\n{notice}\n```\n"
    (target / FILE).write_text(text, encoding="utf-8")


def append_credits(target: Path, lines: Iterable[str]) -> None:
    """Add a paragraph to the attribution of the source that is written to `target`, such as the names of authors."""
    with (target / FILE).open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(lines) + "\n")
