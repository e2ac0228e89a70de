"""The code rules of CONTRIBUTING.md as checks over one parsed file; tests/test_repository.py applies them.

A rule is a function of a `File` that yields (line, what is wrong). Rules read the syntax tree, so a word in a
comment is not an offence, except for `device_word`, which is about words.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80
Finding = tuple[int, str]


@dataclass(frozen=True)
class File:
    """One Python file: path relative to the repository's root, with "/"."""

    path: str
    text: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", ast.parse(self.text, self.path))

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Return (line, dotted name) of every import, at any depth; relative ones are the project's own and skipped."""
        found: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, a.name) for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
            elif isinstance(node, ast.Call) and self.dotted(node.func).endswith(("import_module", "__import__")):
                found += [(node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant)]
        return found

    @cached_property
    def calls(self) -> list[tuple[ast.Call, str]]:
        """Return every call with the dotted name of the called object, import aliases resolved: "torch.load"."""
        return [(n, self.dotted(n.func)) for n in ast.walk(self.tree) if isinstance(n, ast.Call)]

    @cached_property
    def _aliases(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {a.asname: a.name for a in node.names if a.asname}
            elif isinstance(node, ast.ImportFrom):
                names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        return names

    def dotted(self, node: ast.expr) -> str:
        """Return `a.b.c` as text; parts that are not plain names become "?": `open(p).extractall` is "?.extractall"."""
        if isinstance(node, ast.Attribute):
            return f"{self.dotted(node.value)}.{node.attr}"
        return self._aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def megatron_only_in_mcore(file: File) -> Iterator[Finding]:
    """Only megamm/mcore imports Megatron-core, so that a new version affects one folder."""
    for line, name in file.imports:
        if name.split(".")[0] == "megatron":
            yield line, f"imports {name}; go through megamm.mcore"


MEGATRON_NAMES = re.compile("model_parallel_cuda_manual_seed|get_cuda_rng_tracker")
"""Functions of Megatron-core that every device needs, whatever they are called."""


def device_word(file: File) -> Iterator[Finding]:
    """The device is a torch.device argument, chosen in megamm/common/device.py: other code does not name one."""
    for line, text in enumerate(file.text.splitlines(), 1):
        if re.search("cuda", MEGATRON_NAMES.sub("", text), re.IGNORECASE):
            yield line, 'spells "cuda"; take a torch.device argument instead'


def file_length(file: File) -> Iterator[Finding]:
    """A file is short enough to read at once."""
    lines = len(file.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield lines, f"has {lines} lines; at most {MAX_FILE_LINES}, so split it by subject"


def function_length(file: File) -> Iterator[Finding]:
    """A function is short enough to see at once."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"


def module_docstring(file: File) -> Iterator[Finding]:
    """Each module describes its purpose."""
    if not ast.get_docstring(file.tree):
        yield 1, "has no module docstring"


EXECUTING_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def data_is_not_code(file: File) -> Iterator[Finding]:
    """Data read from a file is never executed and never written outside its folder."""
    for line, name in file.imports:
        if name.split(".")[0] in EXECUTING_MODULES:
            yield line, f"imports {name}; use safetensors, JSON or npy"
    for call, name in file.calls:
        given = {k.arg: k.value for k in call.keywords}

        def is_true(key: str, given: dict[str | None, ast.expr] = given) -> bool:
            value = given.get(key)
            return isinstance(value, ast.Constant) and value.value is True

        if name == "torch.load" and not is_true("weights_only"):
            yield call.lineno, "torch.load without weights_only=True"
        elif name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            yield call.lineno, f"{name}; use yaml.safe_load"
        elif name in ("numpy.load", "np.load") and "allow_pickle" in given and not _is_false(given["allow_pickle"]):
            yield call.lineno, "numpy.load with allow_pickle"
        elif name.endswith((".extractall", ".unpack_archive")):
            yield call.lineno, f"{name}; read members one by one"
        elif name in ("eval", "exec", "os.system") or is_true("shell"):
            yield call.lineno, f"{name} runs text as code"


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def no_swallowed_errors(file: File) -> Iterator[Finding]:
    """A handler for all exceptions hides errors, unless it raises again."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler):
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(t is None or file.dotted(t) in ("Exception", "BaseException") for t in types)
            if broad and not any(isinstance(n, ast.Raise) for b in node.body for n in ast.walk(b)):
                yield node.lineno, "catches every exception and raises none; name the ones expected"


def no_work_at_import(file: File) -> Iterator[Finding]:
    """Importing a module only defines names; a call for its effect, a loop or a `with` at the top level is work."""
    for node in file.tree.body:
        if isinstance(node, ast.For | ast.While | ast.With):
            yield node.lineno, f"{type(node).__name__.lower()} at the top level works at import"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = file.dotted(node.value.func)
            if not name.endswith(".add_typer"):
                yield node.lineno, f"{name}(...) at the top level works at import"


EARLIER_WORDS = {"place": "device, path, offset, coordinates or index", "pulse": "heartbeat"}
"""Words that may not be part of an identifier, with the words to use: they had several meanings at once."""
EARLIER_NAMES = {
    "Alone": "SingleNode",
    "Lane": "TaskQueue",
    "LeftOut": "SkippedWindow or SkippedSample",
    "OwnNorms": "LocalGradNorms",
    "PaperWorld": "FakeWorld",
    "Recipe": "RowSpec",
    "RunState": "TrainState",
    "RunStore": "CheckpointManager",
    "SampleSet": "TokenDataset",
    "StoredPart": "TokenSpan",
    "own_norms": "local_grad_norms",
    "padded_size": "padded_vocabulary of model/layout.py",
    "row_map": "packed_seq_metadata",
    "whole_store": "whole_parameters",
}
"""Identifiers that the field calls otherwise, with the name to use."""


def _defined(node: ast.AST) -> Iterator[str]:
    """The identifiers that a node defines: variables, attributes, parameters, functions, classes, import aliases."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname for alias in node.names if alias.asname)


def earlier_names(file: File) -> Iterator[Finding]:
    """Identifiers are the field's terms; the names in EARLIER_WORDS and EARLIER_NAMES do not come back."""
    for node in ast.walk(file.tree):
        for name in _defined(node):
            words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
            old = [w for w in EARLIER_WORDS if {w, f"{w}s"} & {word.lower() for word in words}]
            better = EARLIER_NAMES.get(name) or (EARLIER_WORDS[old[0]] if old else None)
            if better:
                yield getattr(node, "lineno", 1), f"{name}: write {better}"


_NEVER_FIRST = re.compile(r"(Of|To where|By|Told|So (many|much|that)|Than) ")
_BEFORE_A_COMMA = re.compile(r"(With|Without|For|In|On|At|As|So|From|Under|Beside) ")


def docstring_opening(file: File) -> Iterator[Finding]:
    """A docstring opens with a verb, a noun phrase or a whole sentence ("With the lock, read ..."), not "Of ..."."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = re.split(r"[.:;](?=\s|$)", ast.get_docstring(node) or "", maxsplit=1)[0]
        if _NEVER_FIRST.match(first) or (_BEFORE_A_COMMA.match(first) and "," not in first):
            yield node.lineno, f"the docstring of {node.name} opens with a fragment: {first.split()[0]!r}"


@dataclass(frozen=True)
class Rule:
    """A check, the places where it holds, the exceptions with their reasons, and snippets that must violate it.

    where: path prefixes; except_for: "path" or "path: what is wrong", or the beginning of either -> reason.
    """

    check: Callable[[File], Iterator[Finding]]
    where: tuple[str, ...]
    offending: tuple[str, ...]
    except_for: dict[str, str] = field(default_factory=dict)

    def findings(self, files: list[File]) -> list[str]:
        """Return "path:line: what" of every offence in the files where the rule holds."""
        return [
            f"{file.path}:{line}: {what}"
            for file in files
            if file.path.startswith(self.where)
            for line, what in self.check(file)
            if not f"{file.path}: {what}".startswith(tuple(self.except_for))
        ]


CODE = ("megamm/", "tools/", "benchmarks/", "launchers/")
EVERYWHERE = (*CODE, "tests/", "csrc/", "setup.py")
_LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES

RULES = [
    Rule(
        megatron_only_in_mcore,
        EVERYWHERE,
        (
            "import megatron.core as mcore",
            "def f():\n    from megatron.core import parallel_state",
            "import importlib\nimportlib.import_module('megatron.core')",
        ),
        {
            "megamm/mcore/": "the door",
            "tests/test_mcore_": "tests of the door itself",
            "tests/lib/parity_faults.py": "breaks Megatron-core on purpose",
            "tests/lib/guard_faults.py": "breaks Megatron-core on purpose",
            "tests/lib/bin_reference.py": "Megatron-core's files are the reference for ours",
            "benchmarks/loader.py: imports megatron.energon": "another package, a peer that is measured",
        },
    ),
    Rule(
        device_word,
        EVERYWHERE,
        ("x.to('cuda')", "import torch\ntorch.CUDA", "# on cuda only", "model_parallel_cuda_manual_seed('cuda')"),
        {
            "megamm/common/device.py": "chooses the device",
            "megamm/mcore/cpu.py": "adapts what Megatron-core assumes of the device",
            "megamm/ops/": "the kernels' Python face",
            "megamm/fakegpu/": "pretends to be the device",
            "megamm/mcore/fake_gpu.py": "adapts what Megatron-core assumes of a device without values",
            "csrc/": "the kernels",
            "setup.py": "builds the kernels, names the extra",
            "tests/lib/repository_rules.py": "spells the rule",
            "tests/lib/requirement_files.py": "names a package that has the word in its name",
            "tests/test_repository.py": "names an extra that has the word as its name",
            "tests/test_device.py": "tests the choice",
            "tests/test_mcore_": "tests the adaptation",
            "tests/lib/emulated.py": "builds the kernels for a CPU",
            "tests/test_csrc.py": "compiles the kernels",
            "tests/test_fork_server.py": "its fakes initialise the GPU as installed packages do",
        },
    ),
    Rule(file_length, ("megamm/",), ("x = 1\n" * (MAX_FILE_LINES + 1),)),
    Rule(function_length, CODE, (_LONG_FUNCTION, f"class A:\n    async {_LONG_FUNCTION}".replace("    x", "      x"))),
    Rule(module_docstring, EVERYWHERE, ("", "x = 1", "# only a comment")),
    Rule(
        earlier_names,
        ("megamm/",),
        (
            "place = 1",
            "def f(place): ...",
            "def f(*, first_places=()): ...",
            "class A:\n    def __init__(self):\n        self.place: int = 0",
            "class Place: ...",
            "class OpenPlace: ...",
            "def place_of(x): ...",
            "for k, place in enumerate(x): ...",
            "lambda place: 0",
            "import megamm.common.device as place",
            "pulse = 1",
            "class SampleSet: ...",
            "row_map = 1",
        ),
        {
            "megamm/tokenizers/points/model.py: encoder_places": "the name of a tensor in saved tokenizers",
            "megamm/tokenizers/points/model.py: decoder_places": "the name of a tensor in saved tokenizers",
        },
    ),
    Rule(
        docstring_opening,
        CODE,
        (
            'def f():\n    """Of all values, the least."""',
            'def f():\n    """To where it is after that many updates, from wherever it is."""',
            'def f():\n    """By path, the digest of a file."""',
            'def f():\n    """Told the result, gives the one to use."""',
            'def f():\n    """So many bytes more."""',
            'class A:\n    """With the weights of each modality."""',
            'class A:\n    """Without the memory that it takes."""',
            'class A:\n    def f(self):\n        """For the ranks of a node: their addresses."""',
            'async def f():\n    """In the order of arrival.\n\n    A step, then the next."""',
            'def f():\n    """On the device; with its name, if it has one."""',
            'def f():\n    """At the end of a run."""',
            'def f():\n    """As text."""',
        ),
    ),
    Rule(
        data_is_not_code,
        CODE,
        (
            "import pickle",
            "def f():\n    from pickle import loads",
            "import torch\ntorch.load(p)",
            "from torch import load as read\nread(p, weights_only=False)",
            "import yaml\nyaml.load(s, yaml.Loader)",
            "import tarfile\nwith tarfile.open(p) as t:\n    t.extractall(d)",
            "import numpy as np\nnp.load(p, allow_pickle=True)",
            "import subprocess\nsubprocess.run(s, shell=True)",
            "eval(s)",
        ),
        {"megamm/checkpoint/index.py: imports pickle": "reads torch's checkpoint index with a restricted unpickler"},
    ),
    Rule(
        no_swallowed_errors,
        CODE,
        (
            "try:\n    f()\nexcept Exception:\n    pass",
            "try:\n    f()\nexcept:\n    x = 1",
            "try:\n    f()\nexcept (OSError, BaseException) as e:\n    print(e)",
        ),
    ),
    Rule(
        no_work_at_import,
        CODE,
        ("import torch\ntorch.manual_seed(0)", "for i in range(3):\n    f(i)", "with open(p) as f:\n    x = f.read()"),
    ),
]
