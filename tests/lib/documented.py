"""The commands in the docs: every line of their sh blocks, and every `megamm ...` in their text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_run import ROOT

SHELL_BLOCKS = ("sh", "bash", "shell", "console")
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True)
class Documented:
    """One command line of a page, without comment, with continuation lines joined."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages that users and contributors read."""
    found = [root / "README.md", root / "CONTRIBUTING.md", root / "csrc" / "README.md"]
    return found + sorted([*root.glob("docs/**/*.md"), *root.glob("launchers/**/README.md")])


def commands(root: Path = ROOT) -> list[Documented]:
    """Return every command line of every shell block."""
    return [
        command for page in pages(root) for command in in_blocks(page.relative_to(root).as_posix(), page.read_text())
    ]


def in_blocks(page: str, text: str) -> Iterator[Documented]:
    """Yield command lines of the shell blocks; in console blocks, those after the prompt."""
    for block in _FENCE.finditer(text):
        if block["language"] not in SHELL_BLOCKS:
            continue
        first = text.count("\n", 0, block.start("text")) + 1
        waiting, begin = "", 0
        for number, line in enumerate(block["text"].splitlines(), first):
            if block["language"] == "console" and not waiting:
                if not line.lstrip().startswith("$ "):
                    continue
                line = line.lstrip()[2:]
            begin = begin if waiting else number
            waiting += without_comment(line).strip()
            if waiting.endswith("\\"):
                waiting = waiting[:-1].rstrip() + " "
                continue
            if waiting:
                yield Documented(page, begin, waiting)
            waiting = ""


def without_comment(line: str) -> str:
    """Return the line up to a # that begins a word outside quotes."""
    masked = _QUOTED.sub(lambda found: "x" * len(found[0]), line)
    comment = re.search(r"(^|\s)#", masked)
    return line[: comment.start()] if comment else line


def in_text(root: Path = ROOT) -> list[Documented]:
    """Return commands in `backquotes` outside blocks that begin with one of our programs."""
    found = []
    for page in pages(root):
        text = _FENCE.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), page.read_text())
        for code in re.finditer(r"`([^`]+)`", text):
            words = " ".join(code[1].split())
            if re.match(r"(megamm [a-z]|make [a-z]|python (tools|benchmarks|tests|examples)/)", words):
                found.append(
                    Documented(page.relative_to(root).as_posix(), text.count("\n", 0, code.start()) + 1, words)
                )
    return found


def variants(text: str) -> list[str]:
    """Return a synopsis as commands: without the parts in [brackets], and with them; A|B gives A, A... one A."""
    without = text
    while "[" in without and (shorter := re.sub(r"\s*\[[^\[\]]*\]", "", without)) != without:
        without = shorter
    return [_plain(text)] if without == text else [_plain(without), _plain(re.sub(r"[\[\]]", "", text))]


def _plain(text: str) -> str:
    text = re.sub(r"\bkey=value( \.\.\.)?", "", text)
    text = re.sub(r"(?<=\w)\.\.\.(?= |$)", "", text)
    text = re.sub(r"\b([\w]+)(\|\w+)+", r"\1", text)
    text = re.sub(r" (N|BYTES)(?= |$)", lambda found: {"N": " 1", "BYTES": " 1000000"}[found[1]], text)
    return re.sub(r" {2,}", " ", text).strip()
