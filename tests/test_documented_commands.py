"""Every command in the docs works as typed, in a new shell, on tiny data with the names used there.

Every documented command has an entry in documented_checks.py that defines how it is checked and, if it is not run, why.
Commands that take seconds run in `make test-all`; their options and files are also checked in `make test`.
"""

import re
import shlex
import shutil
import subprocess

import pytest
from documented import Documented, commands, in_blocks, in_text, variants, without_comment
from documented_checks import (
    USAGE_ERROR,
    check,
    entry_of,
    is_heavy,
    parse_words,
    parts,
    remove,
    run,
    shown,
    wants_slurm,
)
from documented_workshop import make, shell
from slurm_cluster import GPUS, NODES, Cluster, why_not
from tiny_run import ROOT

COMMANDS = commands()
INLINE = in_text()
ONCE = list({shown(c.text)[0]: c for c in reversed(COMMANDS)}.values())[::-1]
"""The first of commands that occur on several pages."""
LIGHT = [c for c in ONCE if not is_heavy(c.text)]
HEAVY = [c for c in ONCE if is_heavy(c.text) and not wants_slurm(c.text)]
SLURM = [c for c in ONCE if wants_slurm(c.text)]


def test_the_pages_are_read():
    assert {"README.md", "CONTRIBUTING.md", "docs/conversion.md"} <= {c.page for c in COMMANDS}
    assert len(COMMANDS) > 30 and len(INLINE) > 20


def test_blocks_are_read_as_a_shell_does():
    page = "text\n```sh\na --b 'c # d'   # e\n# only a comment\n\nb \\\n    --c\n```\n```python\nx\n```\n"
    page += "  ```console\n  $ c\n  said\n  ```\n"
    assert list(in_blocks("p", page)) == [
        Documented("p", 3, "a --b 'c # d'"),
        Documented("p", 6, "b --c"),
        Documented("p", 13, "c"),
    ]
    assert without_comment("a#b") == "a#b"
    assert variants("m x RUN|OTHER PLACE... [key=value ...] [--nproc N] [--dtype bf16|fp16]") == [
        "m x RUN PLACE",
        "m x RUN PLACE --nproc 1 --dtype bf16",
    ]


def test_every_command_has_an_entry():
    unknown = [str(c) for c in COMMANDS if any(entry_of(part) is None for part in parts(c.text))]
    assert not unknown, "these have no entry in tests/lib/documented_checks.py:\n" + "\n".join(unknown)


def _usage_errors(found: list[Documented]) -> list[str]:
    errors = []
    for command in found:
        for line in (line for text in shown(command.text) for line in parts(text)):
            if line.startswith("megamm "):
                words = shlex.split(re.sub(r" (\.\.\.|…)(?= |$)", "", line))[1:]
                try:
                    parse_words(words)
                except USAGE_ERROR as error:
                    errors.append(f"{command}: {error.format_message()}")
    return errors


def test_options_and_subcommands_exist():
    assert not _usage_errors(COMMANDS), "\n".join(_usage_errors(COMMANDS))
    assert (
        len(_usage_errors([Documented("p", 1, "megamm train X --nprocs 2"), Documented("p", 2, "megamm trane X")])) == 2
    )


def test_what_the_text_names_exists():
    """Commands in sentences often lack arguments: subcommands, options, targets and files must exist."""
    for command in INLINE:
        program, *words = command.text.split()
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        elif program == "python":
            assert (ROOT / words[0]).is_file(), command
        else:
            wrong = [e for e in _usage_errors([command]) if "No such" in e]
            assert not wrong, wrong[0]


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Return a folder with the repository's files, without data."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("launchers", "docs", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("command", LIGHT, ids=str)
def test_command_is_checked(command, light):
    for line in shown(command.text):
        check(line, light)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Return a folder that is made once; every command gets a copy."""
    folder = tmp_path_factory.mktemp("workshop") / "made"
    make(folder)
    return folder


@pytest.fixture
def copy(workshop, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(workshop, folder, symlinks=True)
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    yield folder
    remove(folder)


@pytest.mark.everything
@pytest.mark.parametrize("command", HEAVY, ids=str)
def test_command_runs(command, copy):
    for line in shown(command.text)[:1]:
        check(line, copy)


@pytest.fixture(scope="module")
def cluster():
    if why := why_not():
        pytest.skip(why)
    with Cluster() as cluster:
        yield cluster


@pytest.mark.everything
@pytest.mark.slurm
@pytest.mark.parametrize("command", SLURM, ids=str)
def test_slurm_accepts(command, cluster, light):
    """Run the line as typed, with a function for sbatch that adds --test-only; 16 nodes of 8 GPUs become fewer."""
    (light / "CONFIG").write_text("")

    def on_the_cluster(entry, line, folder):
        line = re.sub(r"--nodes[= ]\d+", f"--nodes={len(NODES)}", line)
        line = re.sub(r"--gpus-per-node[= ]\d+", f"--gpus-per-node={GPUS}", line)
        line = re.sub(r"--ntasks-per-node[= ]\d+", f"--ntasks-per-node={GPUS}", line)
        done = shell(f'sbatch() {{ command sbatch --test-only "$@"; }}\n{line}', folder, **cluster.env)
        assert done.returncode == 0 and "to start at" in done.stdout, f"{line}\n{done.stdout}"

    for line in shown(command.text):
        check(line, light, instead=on_the_cluster)


def test_a_wrong_command_fails(light):
    for wrong in (
        "make no-such-target",
        "pip install 'megamm[none]'",
        "pip install torch==1.0",
        "kubectl logs --no-such",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check(wrong, light)
    with pytest.raises(AssertionError, match="no entry"):
        check("curl example", light)
    with pytest.raises(AssertionError, match="exit code"):
        run(entry_of(". launchers/slurm/cluster.env"), "cat absent", light)
