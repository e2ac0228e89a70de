"""The house in order: layers, no import cycles, class names once (tests/lib/layer_rules.py); each rule can fail."""

import re
from pathlib import Path

import pytest
from layer_rules import LAYERS, TREE_RULES, TreeRule
from repository_rules import File

ROOT = Path(__file__).parents[1]
FILES = [File(path.relative_to(ROOT).as_posix(), path.read_text()) for path in sorted((ROOT / "megamm").rglob("*.py"))]
NAMES = [rule.check.__name__ for rule in TREE_RULES]


@pytest.mark.parametrize("rule", TREE_RULES, ids=NAMES)
def test_rule_is_kept(rule: TreeRule) -> None:
    found = list(rule.check(FILES))
    assert not found, f"{rule.check.__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "tree"), [pytest.param(r, t, id=r.check.__name__) for r in TREE_RULES for t in r.offending]
)
def test_rule_finds_an_offence(rule: TreeRule, tree: dict[str, str]) -> None:
    found = list(rule.check([File(path, text) for path, text in tree.items()]))
    assert found and all(re.match(r"megamm/\w+.*\.py:\d+: \w", line) for line in found)


@pytest.mark.parametrize("rule", TREE_RULES, ids=NAMES)
def test_rule_passes_a_clean_tree(rule: TreeRule) -> None:
    tree = {
        "megamm/__init__.py": "__version__ = '1'",
        "megamm/common/errors.py": "from megamm import __version__\nclass UserError(Exception): ...",
        "megamm/data/a.py": (
            "from typing import TYPE_CHECKING\nfrom megamm.common.errors import UserError\n"
            "if TYPE_CHECKING:\n    from megamm.cli import main\n    from megamm.data.b import Row\n"
            "class _Local: ...\nclass Packing: ..."
        ),
        "megamm/data/b.py": "from megamm.data import a\nclass Row: ...\nclass _Local: ...",
        "megamm/cli/__init__.py": "from megamm.data import b\n",
    }
    assert not list(rule.check([File(path, text) for path, text in tree.items()]))


def test_every_layer_exists() -> None:
    assert set(LAYERS) == {path.name for path in (ROOT / "megamm").iterdir() if (path / "__init__.py").exists()}
