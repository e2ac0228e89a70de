"""Rules of the repository: code rules, declared and pinned packages, a fast command, valid scripts.

Each code rule is also tested on snippets that break it, so that it can fail.
"""

import ast
import dataclasses
import importlib.metadata
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pydantic
import pytest
import yaml
from demo_tools import load_tool
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository_rules import EVERYWHERE, RULES, File, Rule
from requirement_files import IMPORT_NAMES_OF_EXTRAS, read_pins, setup_lists

import megamm
from megamm.config import RunConfig, reference

ROOT = Path(__file__).parents[1]
RULE_NAMES = [rule.check.__name__ for rule in RULES]


@cache
def files() -> list[File]:
    """Return all files that have rules, parsed at first use and not whenever tests are collected."""
    return [
        File(path.relative_to(ROOT).as_posix(), path.read_text())
        for top in EVERYWHERE
        for path in sorted((ROOT / top).rglob("*.py") if top.endswith("/") else [ROOT / top])
    ]


CLEAN = '''"""A module that keeps every rule."""

import numpy as np
import torch
import yaml

LIMIT = max(1, 2)


def load(path, device):
    """Read."""
    try:
        return torch.load(path, weights_only=True), yaml.safe_load(path), np.load(path, allow_pickle=False)
    except OSError:
        return None
    except Exception as error:
        raise ValueError(path) from error


if __name__ == "__main__":
    load("x", torch.device("cpu"))
'''


def test_the_tree_is_read() -> None:
    paths = {file.path for file in files()}
    assert {"setup.py", "megamm/cli/__init__.py", "tests/test_repository.py"} <= paths
    assert not any("venv" in path for path in paths)


@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_rule_is_kept(rule: Rule) -> None:
    found = rule.findings(files())
    assert not found, f"{rule.check.__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "snippet"), [pytest.param(r, s, id=r.check.__name__) for r in RULES for s in r.offending]
)
def test_rule_finds_an_offence(rule: Rule, snippet: str) -> None:
    found = rule.findings([File("megamm/offender.py", snippet)])
    assert found
    assert re.match(r"megamm/offender\.py:\d+: \w", found[0])


@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_rule_passes_clean_code(rule: Rule) -> None:
    assert not rule.findings([File("megamm/clean.py", CLEAN)])


def test_exceptions_are_for_the_named_places_only() -> None:
    offence = RULES[0].offending[0]
    assert not RULES[0].findings([File("megamm/mcore/spec.py", offence)])
    assert RULES[0].findings([File("tests/test_train.py", offence)])


def test_no_exception_outlives_its_reason() -> None:
    """An exception for one offence ("path: what") must still be needed; otherwise the next offence there is hidden."""
    for rule in RULES:
        found = [re.sub(r":\d+: ", ": ", f) for f in dataclasses.replace(rule, except_for={}).findings(files())]
        stale = [e for e in rule.except_for if ": " in e and not any(f.startswith(e) for f in found)]
        assert not stale


# --- packages: setup.py has the requirements, requirements/ the tested versions ---


def _unmet(requirements: list[str], pins: dict[str, str]) -> list[str]:
    """Return the requirements that no pin satisfies."""
    parsed = [Requirement(r) for r in requirements]
    return [str(r) for r in parsed if pins.get(canonicalize_name(r.name), "0") not in r.specifier]


TESTED_EXTRAS = ("dev", "deepspeed", "cuda", "eval", "gguf", "heic", "parquet", "quantize", "s3", "slurm", "speech")
"""Return the extras that `make venv` installs."""


def test_every_requirement_is_pinned_within_its_range() -> None:
    needed, extras = setup_lists()
    assert not _unmet(needed, read_pins("torch") | read_pins("base"))
    assert not _unmet([r for extra in TESTED_EXTRAS for r in extras[extra]], read_pins("dev"))
    assert not _unmet([*needed, "pytest", "pytest-timeout", "pytest-xdist"], read_pins("latest"))
    assert _unmet(needed, read_pins("dev")) == [str(Requirement(r)) for r in needed]


def test_no_pin_without_a_requirement() -> None:
    needed, extras = setup_lists()
    tested = [r for extra in TESTED_EXTRAS for r in extras[extra]]
    declared = {canonicalize_name(Requirement(r).name) for r in needed + tested}
    build_tools = {"setuptools", "wheel"}
    assert set(read_pins("torch") | read_pins("base") | read_pins("dev")) == declared | build_tools


def test_pins_agree_with_the_constraints() -> None:
    direct, locked = read_pins("torch") | read_pins("base") | read_pins("dev"), read_pins("constraints")
    assert direct.items() <= locked.items(), direct.items() - locked.items()


def test_every_import_is_declared() -> None:
    needed, extras = setup_lists()
    all_of_them = [*needed, *(r for extra in extras.values() for r in extra)]
    for_use = {canonicalize_name(Requirement(r).name) for r in all_of_them}
    shipped = for_use - {canonicalize_name(Requirement(r).name) for r in extras["dev"]}
    packages_of = importlib.metadata.packages_distributions()
    local = {
        "megamm",
        "tests",
        *(p.stem for folder in ("tests", "tests/lib", "tools") for p in (ROOT / folder).glob("*.py")),
    }
    undeclared = []
    for file in files():
        allowed = shipped | {"setuptools"} if file.path.startswith(("megamm/", "setup.py")) else for_use | {"packaging"}
        for line, name in file.imports:
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in local:
                continue
            packages = packages_of.get(top) or [IMPORT_NAMES_OF_EXTRAS.get(top, top)]
            if not allowed & {canonicalize_name(p) for p in packages}:
                undeclared.append(f"{file.path}:{line}: imports {name}, which setup.py does not declare")
    assert not undeclared, "\n".join(undeclared)


def test_no_test_module_is_imported() -> None:
    """Code that several test files use is in tests/lib."""
    found = [
        f"{f.path}:{line}: imports {name}" for f in files() for line, name in f.imports if name.startswith("test_")
    ]
    assert not found, "\n".join(found)


# --- the command ---


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_is_installed_under_its_name() -> None:
    module = _run(sys.executable, "-m", "megamm", "--help")
    script = Path(sys.executable).with_name("megamm")
    assert script.exists(), "the environment is not complete; run `make venv`"
    installed = _run(str(script), "--help")
    assert (module.returncode, installed.returncode) == (0, 0), module.stderr + installed.stderr
    assert "tokenizer" in installed.stdout
    assert importlib.metadata.version("megamm") == megamm.__version__, "run `make venv`"


def test_help_and_config_load_nothing_heavy() -> None:
    """`megamm --help` and a config error must answer quickly, so they must not import torch (seconds)."""
    heavy = {"torch", "megatron", "transformers", "tensorboard"}
    probe = "import sys, megamm.cli, megamm.config; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = _run(sys.executable, "-c", probe)
    assert done.returncode == 0, done.stderr
    assert "typer" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


# --- scripts ---


SCRIPTS = [".ci/run", "tools/system_packages.sh", *(path.relative_to(ROOT) for path in ROOT.glob("launchers/**/*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_are_sound(script: str) -> None:
    done = _run("bash", "-n", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_scripts_are_as_shellcheck_likes_them() -> None:
    done = _run("shellcheck", "-x", *map(str, SCRIPTS), "launchers/slurm/cluster.env")
    assert done.returncode == 0, done.stdout
    assert (
        subprocess.run(
            ["shellcheck", "-"], input="#!/bin/sh\necho $1\n", text=True, stdout=subprocess.DEVNULL
        ).returncode
        == 1
    )


def test_ci_runs_the_tests() -> None:
    """CI runs `make test` last, so that pytest's summary is the last line."""
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec make test"
    planned = _run("make", "--no-print-directory", "-n", "test").stdout.splitlines()[-1]
    beside, _, tests = planned.partition(" & lint=$!; ")
    assert beside == "make --no-print-directory lint"
    ordinary = r".* -m pytest -n 4 --dist loadfile --no-loadscope-reorder ; tests=\$\?; wait \$lint && exit \$tests"
    assert re.fullmatch(ordinary, tests), "all that is not marked `everything`, and both must pass"
    linted = _run("make", "--no-print-directory", "-n", "lint").stdout
    assert "ruff check" in linted and "-m mypy" in linted


def test_hooks_and_lint_run_the_same_tools() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "a hook of another repository would have to be cloned"
    planned = _run("make", "--no-print-directory", "-n", "lint").stdout
    for hook in hooks[0]["hooks"]:
        tool = hook["entry"].removeprefix(".venv/bin/python -m ").removesuffix(" --force-exclude")
        assert f"-m {tool}" in planned


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("remedy = 'mend the file'", 1),  # words: ok
        ("The run goes on, and both are read anew.", 2),  # words: ok
        ("This is no folder.", 1),  # words: ok
        ("The index has not the key.", 1),  # words: ok
        ("There is no folder, and it has not been written; it is no longer needed.", 0),
        ("amend, recommended, a new one", 0),
        ("nobody  # words: ok", 0),
    ],
)
def test_words_that_have_a_plainer_one_are_found(line: str, count: int) -> None:
    assert len(list(load_tool("check_words").findings(f"first\n{line}\n"))) == count


def test_no_such_word_is_in_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("check_words")
    assert tool.main(tool.files()) == 0, capsys.readouterr().out


def test_a_word_of_the_list_fails_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nThe run goes on.\n")  # words: ok
    assert load_tool("check_words").main([page]) == 1
    assert capsys.readouterr().out == f"{page}:3: 'goes on': write continues, resumes\n"  # words: ok


class _WithAnotherKey(RunConfig):
    """A run's file."""

    another_key: int = pydantic.Field(default=1, ge=0, description="A key that docs/config.md does not have.")


def test_the_page_of_config_keys_is_stale_after_a_change_of_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_config.py compares the page with the schema; this shows that the comparison can fail."""
    page = (ROOT / "docs" / "config.md").read_text()
    monkeypatch.setattr(reference, "RunConfig", _WithAnotherKey)
    assert "| `another_key` | integer ≥ 0 | `1` |" in reference.page()
    assert reference.page() != page


def test_every_object_of_the_api_pages_exists() -> None:
    """`make docs` fails otherwise, and it is not part of `make test`."""
    named = [
        line.removeprefix("::: ").strip()
        for page in sorted((ROOT / "docs" / "api").glob("*.md"))
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    ]
    assert len(named) > 40
    for name in named:
        module, _, last = name.rpartition(".")
        path = ROOT / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert file.exists(), f"{name}: there is no {file.relative_to(ROOT)}"
        nodes = ast.parse(file.read_text()).body
        defined = {getattr(node, "name", None) for node in nodes}
        defined |= {
            alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        defined |= {getattr(t, "id", None) for node in nodes if isinstance(node, ast.Assign) for t in node.targets}
        defined |= {getattr(node.target, "id", None) for node in nodes if isinstance(node, ast.AnnAssign)}
        assert last in defined, f"{name} is not in {file.relative_to(ROOT)}"


def test_every_folder_of_the_package_is_installed() -> None:
    """setup.py finds packages by their __init__.py: a folder without one is missing in a built wheel."""
    folders = {file.parent for file in (ROOT / "megamm").rglob("*.py")}
    assert sorted(f.name for f in folders if not (f / "__init__.py").exists()) == []
