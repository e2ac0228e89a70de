"""Part of `make lint`: words and phrases that the project replaces by plain ones, in Python, Markdown, shell and YAML.

    python -m tools.check_words [FILE ...]      # default: all files of the repository

Prints FILE:LINE and the better word for each, and exits with code 1 if there are any. A line that needs such a word
ends with `words: ok` in a comment.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".md", ".sh", ".yaml", ".yml")
BETTER = {  # words: ok
    r"mend(s|ed|ing)?": "fix",  # words: ok
    r"anew": "again, or re-",  # words: ok
    r"nobody": "no one, no process",  # words: ok
    r"alike": "identical, the same way",  # words: ok
    r"dearer": "more expensive",  # words: ok
    r"goes on|go on": "continues, resumes",  # words: ok
    r"(is|are|was) told": "receives, is logged",  # words: ok
    r"(?<!there )(?<!There )(is|are) no (?!longer|more|less|one)[a-z]+": "is not a",
    r"has not (a|an|any|the)": "lacks, does not have",  # words: ok
}
_PATTERNS = {re.compile(rf"\b({pattern})\b"): word for pattern, word in BETTER.items()}


def findings(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, what was found, the better word) of a file's text."""
    for number, line in enumerate(text.splitlines(), 1):
        if "words: ok" in line:
            continue
        for pattern, better in _PATTERNS.items():
            for match in pattern.finditer(line):
                yield number, match[0], better


def main(paths: list[Path]) -> int:
    found = [(path, *finding) for path in paths for finding in findings(path.read_text(encoding="utf-8"))]
    for path, line, word, better in found:
        print(f"{path}:{line}: {word!r}: write {better}")
    return int(bool(found))


def files() -> list[Path]:
    """The repository's files of these kinds, without hidden folders and build outputs, which are not entered."""
    found: list[Path] = []
    for folder, inside, names in os.walk(ROOT):
        outputs = ("build", "out", "site") if Path(folder) == ROOT else ()
        inside[:] = [name for name in inside if not name.startswith(".") and name not in outputs]
        found += [Path(folder, name) for name in names if not name.startswith(".") and name.endswith(SUFFIXES)]
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or files()))
