"""The pages of the repository: every link leads somewhere, every file that they name exists, the architecture is right.

Links may have anchors. A path in backticks is a mention if it begins with a folder of the repository (`tests/lib/`).
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented import ROOT, pages
from layer_rules import LAYERS

PAGES = [*pages(), ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
_FENCE = re.compile(r"^ *```.*?^ *```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_MENTION = re.compile(r"`([\w.\-/*<>]+\.(?:py|sh|md|yaml|toml|cpp|cu|cuh|h|json|txt|sbatch))`")
_PLACEHOLDER = re.compile(r"NAME|<\w+>|RUN/|OUT/|FOLDER/|URL/|EXPORT|step_\d|\*")
NOT_FILES_HERE = {
    "CHANGELOG.md": "names the files of earlier versions",
}
"""Pages whose mentions are not checked, with the reason; their links are."""


def prose(text: str) -> str:
    """The text without its fenced blocks, whose lines are kept as empty ones."""
    return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs derive them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def broken_links(page: Path, text: str, root: Path = ROOT) -> Iterator[str]:
    """The links of a page that lead nowhere, each as one line."""
    for number, line in enumerate(prose(text).splitlines(), 1):
        for target in _LINK.findall(line):
            if "://" in target or target.startswith("mailto:"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve()
            where = f"{page.relative_to(root)}:{number}"
            if path and not file.exists():
                yield f"{where}: {target} does not exist"
            elif anchor and anchor not in anchors(file.read_text() if path else text):
                yield f"{where}: {target} has no such heading"


def missing_files(page: Path, text: str, root: Path = ROOT) -> Iterator[str]:
    """The files of the repository that a page mentions in backticks and that do not exist, each as one line."""
    for number, line in enumerate(prose(text).splitlines(), 1):
        for path in _MENTION.findall(line):
            is_ours = path.startswith(("megamm/", "tests/", "tools/", "docs/", "csrc/", "launchers/", "benchmarks/"))
            is_ours |= path.startswith(("examples/", "requirements/"))
            if is_ours and not _PLACEHOLDER.search(path) and not (root / path).exists():
                yield f"{page.relative_to(root)}:{number}: there is no {path}"


def label_mismatches(page: Path, text: str, root: Path = ROOT) -> Iterator[str]:
    """Links whose text names another file than the one they lead to."""
    for label, target in re.findall(r"\[`?([\w./\-]+\.\w+)`?\]\(([^)\s#]+)\)", prose(text)):
        if "://" not in target and not ("/" + target).endswith("/" + label.lstrip("./")):
            yield f"{page.relative_to(root)}: the link {label} leads to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    found = [*broken_links(page, text), *label_mismatches(page, text)]
    if page.name not in NOT_FILES_HERE:
        found += missing_files(page, text)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a](no_such.md)", "docs/page.md:1: no_such.md does not exist"),
        (
            "# One\n\n[a](../README.md#no-such-heading)",
            "docs/page.md:3: ../README.md#no-such-heading has no such heading",
        ),
        ("# One two\n[a](#one-two) [b](#three)", "docs/page.md:2: #three has no such heading"),
        ("see `megamm/common/no_such.py`", "docs/page.md:1: there is no megamm/common/no_such.py"),
        (
            "[other.py](../megamm/common/errors.py)",
            "docs/page.md: the link other.py leads to ../megamm/common/errors.py",
        ),
    ],
)
def test_a_wrong_link_or_file_is_found(text: str, message: str) -> None:
    page = ROOT / "docs" / "page.md"
    assert [*broken_links(page, text), *missing_files(page, text), *label_mismatches(page, text)] == [message]


def test_links_in_code_are_not_followed() -> None:
    assert not list(broken_links(ROOT / "docs" / "page.md", "```md\n[a](no_such.md)\n```\n"))


# --- docs/architecture.md ---

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def section(heading: str, text: str = ARCHITECTURE) -> str:
    """The text under a heading, up to the next one of any level."""
    start = re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)
    assert start, f"docs/architecture.md has no heading {heading}"
    return re.split(r"^#", text[start.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def undefined_names(table: str) -> Iterator[str]:
    """Names in the rows of a table that the file linked in the row does not define."""
    for row in table.splitlines():
        linked = re.findall(r"\]\(\.\./(megamm/[\w/]+\.py)\)", row)
        for name in re.findall(r"`(\w+(?:\.\w+)?)`", row):
            if linked and not any(_defines(ROOT / file, name) for file in linked):
                yield f"{name} is not defined in {' or '.join(linked)}"


def _defines(file: Path, name: str) -> bool:
    """Whether a module defines a class, function or method (`Class.method`)."""
    nodes: list[ast.stmt] = ast.parse(file.read_text()).body
    for part in name.split("."):
        found = [n for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
        if not found:
            return False
        nodes = found[0].body
    return True


def test_the_layers_are_those_of_the_rule() -> None:
    assert re.findall(r"^\| \[(\w+)\]", section("Layers"), re.MULTILINE) == list(LAYERS)


def test_the_files_of_a_step_are_at_most_25_and_define_what_the_page_says() -> None:
    text = section("The files of a step")
    rows = re.findall(r"^\| (\d+) \| \[", text, re.MULTILINE)
    assert [int(number) for number in rows] == list(range(1, len(rows) + 1)) and len(rows) <= 25
    assert f"These {len(rows)} files" in text
    assert not list(undefined_names(text))


def test_a_name_that_a_file_does_not_define_is_found() -> None:
    row = "| 1 | [common/errors.py](../megamm/common/errors.py) | `UserError`, `NoSuchError` |"
    assert list(undefined_names(row)) == ["NoSuchError is not defined in megamm/common/errors.py"]
