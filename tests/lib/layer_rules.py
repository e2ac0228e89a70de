"""Rules of the whole package: layers, import cycles, names that exist once; tests/test_layers.py applies them.

A rule is a function of all files of megamm/ that yields what is wrong. An import counts at any depth, also inside a
function, but not under `if TYPE_CHECKING`, which never runs.
"""

import ast
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from repository_rules import File

LAYERS = {
    "common": "errors, device, timers, events, processes: for every other package",
    "config": "the typed configuration of a run",
    "ops": "the fused operators of csrc/",
    "shards": "the format of shards and token caches",
    "media": "decoding of untrusted media files",
    "tokenizers": "media <-> token ids: models and their training",
    "modalities": "one file for each kind of media, and their registry",
    "model": "what needs no Megatron: vocabulary, loss, FLOPs, layout",
    "checkpoint": "saving, verifying, loading and storing of state",
    "mcore": "the only package that imports Megatron-core",
    "engine": "the two engines behind one interface",
    "fakegpu": "runs the GPU path of the native engine without a GPU",
    "data": "raw samples -> shards -> documents -> rows -> batches",
    "elastic": "starts, watches and restarts the ranks of a job",
    "observability": "metrics, goodput, reports",
    "convert": "checkpoints <-> Hugging Face folders",
    "init_from": "a run's first weights from another run or an export",
    "guards": "bad losses, stragglers, faulty nodes",
    "evaluation": "suites, metrics and their reports",
    "train": "the training loop",
    "inference": "generation with an export, and evaluation of one",
    "doctor": "checks of an installation and of nodes",
    "parity": "compares any layout with one rank",
    "plan": "layouts that fit, and their predicted speed",
    "cli": "the `megamm` command",
}
"""The packages of megamm/ from the bottom up: each imports only those above it in this table."""
TOP_LEVEL = {"megamm": "the version", "megamm.__main__": "`python -m megamm`"}
"""The modules that belong to no package; `megamm` itself may be imported by all."""
EMPTY_NAMES = {"parts", "pieces", "place", "tensors", "utils", "helpers", "misc", "stuff", "tools"}
"""Module names that say nothing about their subject."""

Tree = dict[str, File]
"""Files by dotted module name; a package by its own name."""


def modules(files: Sequence[File]) -> Tree:
    """The files of megamm/ by module name."""
    named = {}
    for file in files:
        if file.path.startswith("megamm/") and file.path.endswith(".py"):
            path = PurePosixPath(file.path).with_suffix("")
            named[".".join(path.parts[:-1] if path.name == "__init__" else path.parts)] = file
    return named


@functools.cache
def _imported(file: File) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file that can run."""
    never = {
        id(node)
        for block in ast.walk(file.tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found: list[tuple[int, str]] = []
    for node in ast.walk(file.tree):
        if id(node) in never:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and file.dotted(node.func).endswith(("import_module", "__import__")):
            found += [(node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant)]
    return found


def imports_of(file: File, tree: Tree) -> Iterator[tuple[int, str]]:
    """(line, module of the tree) of every import in a file that can run."""
    for line, name in _imported(file):
        if name in tree:
            yield line, name
        elif (parent := name.rpartition(".")[0]) in tree:
            yield line, parent


def layers(files: Sequence[File]) -> Iterator[str]:
    """A package imports only packages below it: LAYERS has the order."""
    tree, order = modules(files), list(LAYERS)
    for module, file in tree.items():
        if module in TOP_LEVEL:
            continue
        layer = module.split(".")[1]
        if layer not in LAYERS:
            yield f"{file.path}:1: {layer} is not in the table of layers; move it into one of them"
            continue
        for line, name in imports_of(file, tree):
            other = name.split(".")[1] if "." in name else None
            if other in LAYERS and order.index(other) > order.index(layer):
                yield f"{file.path}:{line}: {layer} imports {name}, which is above it; hand the object in, or move it"


def import_cycles(files: Sequence[File]) -> Iterator[str]:
    """No files import each other, directly or by way of others."""
    tree = modules(files)
    graph = {m: {name for _, name in imports_of(file, tree) if name != m} for m, file in tree.items()}
    # A file that starts no chain of imports, or ends none, is in no cycle: removed until none is left to remove.
    while ends := {m for m, names in graph.items() if not names} | (graph.keys() - set().union(*graph.values())):
        graph = {m: names - ends for m, names in graph.items() if m not in ends}
    for module in sorted(graph):
        if module in _reached(graph, module):
            yield f"{tree[module].path}:1: imports itself by way of {', '.join(sorted(graph[module]))}"


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found, todo = set[str](), [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def class_names(files: Sequence[File]) -> Iterator[str]:
    """A public class name exists once, so that a search for it finds one class."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in modules(files).values():
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(f"{file.path}:{node.lineno}")
    for name, places in sorted(found.items()):
        if len(places) > 1:
            yield f"{places[-1]}: class {name} exists in {' and '.join(places[:-1])} too; name it by its subject"


def module_names(files: Sequence[File]) -> Iterator[str]:
    """The name of a module says what it is about."""
    for module, file in modules(files).items():
        if module.rpartition(".")[2] in EMPTY_NAMES:
            yield f"{file.path}:1: the name {module.rpartition('.')[2]} says nothing; name the subject"


@dataclass(frozen=True)
class TreeRule:
    """A check of all files, and trees of (path, text) that must break it."""

    check: Callable[[Sequence[File]], Iterator[str]]
    offending: tuple[dict[str, str], ...]


TREE_RULES = [
    TreeRule(
        layers,
        (
            {"megamm/common/a.py": "from megamm.train import trainer", "megamm/train/trainer.py": ""},
            {"megamm/model/a.py": "def f():\n    from megamm.mcore.b import c", "megamm/mcore/b.py": "c = 1"},
            {"megamm/model/a.py": "import megamm.cli.b", "megamm/cli/b.py": ""},
            {
                "megamm/config/a.py": "from importlib import import_module\nimport_module('megamm.data.b')",
                "megamm/data/b.py": "",
            },
            {"megamm/loose.py": ""},
            {"megamm/another/a.py": ""},
        ),
    ),
    TreeRule(
        import_cycles,
        (
            {
                "megamm/data/a.py": "from megamm.data import b",
                "megamm/data/b.py": "def f():\n    from megamm.data.a import x",
            },
            {
                "megamm/data/a.py": "from megamm.data.b import x",
                "megamm/data/b.py": "import megamm.data.c",
                "megamm/data/c.py": "from megamm.data import a",
                "megamm/data/d.py": "from megamm.data import a",
            },
        ),
    ),
    TreeRule(
        class_names,
        (
            {"megamm/data/a.py": "class Part: ...", "megamm/mcore/b.py": "class Part: ..."},
            {"megamm/data/a.py": "def f():\n    class Part: ...", "megamm/data/b.py": "class Part: ..."},
        ),
    ),
    TreeRule(module_names, ({"megamm/data/parts.py": ""}, {"megamm/mcore/utils.py": ""})),
]
