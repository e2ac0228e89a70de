"""MkDocs hooks: pages and source files outside docs/ become part of the site, so that no link leads out of it.

Pages are written for readers of the repository, with links relative to the file: `[engine](../megamm/engine.py)`.
`on_files` adds the pages of `PAGES` and one page for each source file that any page links to; `on_page_markdown`
rewrites the links. A link to a file that does not exist is a warning, hence an error under `mkdocs build --strict`.
"""

import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.links")

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "csrc/README.md": "operators.md",
    "launchers/k8s/README.md": "kubernetes.md",
    "launchers/slurm/README.md": "slurm.md",
}
"""Path in the repository -> page of the site, for pages that do not live in docs/."""

_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".h": "cpp", ".json": "json", ".toml": "toml"}
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^(```.*?^```[ \t]*$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that live outside docs/, and the source files that pages link to."""
    root = _root(config)
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path, page in PAGES.items():
        texts[path] = (root / path).read_text()
        files.append(File.generated(config, page, content=texts[path]))
    linked = {target for path, text in texts.items() for target in _targets(text, path)}
    for target in sorted(linked):
        page = _page_of(target, root)
        if page.startswith("source/") and (root / target).exists() and files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=_source_page(root, target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page from paths in the repository to pages of the site."""
    root, here = _root(config), page.file.src_uri
    if here.startswith("source/"):
        return markdown
    path = next((path for path, name in PAGES.items() if name == here), f"docs/{here}")

    def rewritten(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or _is_external(target):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not (root / target).exists():
            log.warning("%s links to %s, which does not exist", path, target)
            return match[0]
        relative = posixpath.relpath(_page_of(target, root), posixpath.dirname(here) or ".")
        return match[1] + relative + (f"#{anchor}" if anchor else "") + match[3]

    return _outside_fences(markdown, lambda text: _LINK.sub(rewritten, text))


def _root(config: Any) -> Path:
    return Path(config.config_file_path).parent


def _is_external(target: str) -> bool:
    return "://" in target or target.startswith(("mailto:", "/"))


def _targets(text: str, path: str) -> set[str]:
    """Files and folders of the repository that a page at `path` links to."""
    found: set[str] = set()

    def collect(part: str) -> str:
        for match in _LINK.finditer(part):
            target = match[2].partition("#")[0]
            if target and not _is_external(target):
                found.add(posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))
        return part

    _outside_fences(text, collect)
    return found


def _outside_fences(text: str, change: Any) -> str:
    """Apply `change` to what is not in a fenced code block."""
    return "".join(part if part.startswith("```") else change(part) for part in _FENCE.split(text))


def _page_of(target: str, root: Path) -> str:
    """The page of the site that shows a path of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if (root / target).is_dir() and f"{target}/README.md" in PAGES:
        target = f"{target}/README.md"
    return PAGES.get(target) or f"source/{target}.md"


def _source_page(root: Path, target: str) -> str:
    """A source file as a page, or the list of a folder's files. The search skips these pages."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {target}\n\n"
    if (root / target).is_dir():
        names = sorted(entry for entry in os.listdir(root / target) if not entry.startswith(("__pycache__", ".")))
        return head + "".join(f"- `{target}/{name}`\n" for name in names)
    language = _LANGUAGES.get(Path(target).suffix, "text")
    return f"{head}~~~~~~{language}\n{(root / target).read_text()}\n~~~~~~\n"
