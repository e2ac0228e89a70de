"""How each documented command is checked: run as typed, or, if that is impossible here, by the closest real check.

ENTRIES is the table; the first entry whose pattern matches is used, and a command without one fails the test.
"""

import importlib.metadata
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import typer
from documented import variants
from documented_workshop import shell
from packaging.requirements import Requirement
from tiny_run import ROOT

from megamm.cli import app

USAGE_ERROR = typer.BadParameter.__mro__[1]
"""click's UsageError, of the click that this typer uses: its own or the package."""


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    pattern: the start of the command. check(entry, command, folder) raises if the command is wrong. why: the reason
    that it is not run as typed. replace: text -> text, "$" is the end. names: a name on the page -> what it means in
    the folder. absent: outputs of the command. codes: exit codes that the page promises. heavy: takes seconds, so it
    runs in `make test-all`.
    """

    pattern: str
    check: Callable[["Entry", str, Path], None]
    why: str = ""
    replace: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)
    heavy: bool = False


def entry_of(command: str) -> Entry | None:
    """Return the first entry that matches."""
    return next((entry for entry in ENTRIES if re.match(entry.pattern, command)), None)


# --- checks ---


def run(entry: Entry, command: str, folder: Path) -> None:
    """Run the command as typed, in the folder."""
    prepare(entry, command, folder)
    done = shell(command, folder)
    assert done.returncode in entry.codes, f"{command}: exit code {done.returncode}\n{done.stdout[-3000:]}"


def prepare(entry: Entry, command: str, folder: Path) -> None:
    """Create the names used on the page, and remove the outputs of the command."""
    for name, meaning in entry.names.items():
        remove(folder / name)
        (folder / name).symlink_to(folder / meaning)
    for name in (*entry.absent, *re.findall(r"--(?:to|out) (\S+)", command)):
        remove(folder / name)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def parse(entry: Entry, command: str, folder: Path) -> None:
    """Parse with megamm's own parser: subcommands, options, and the types of their values."""
    parse_words(shlex.split(command)[1:])


def parse_words(words: list[str]) -> None:
    """Raise USAGE_ERROR for an unknown subcommand or option, a missing argument or a wrong value."""
    command = typer.main.get_command(app)
    context = command.make_context("megamm", list(words))
    while isinstance(command, typer.core.TyperGroup):
        name, command, rest = command.resolve_command(context, context._protected_args + context.args)
        assert command is not None
        context = command.make_context(name, rest, parent=context)


def dry_run(entry: Entry, command: str, folder: Path) -> None:
    """Run the same `megamm train` with --dry-run: config, layout and data are checked for all of its nodes."""
    run(entry, f"{command} --dry-run", folder)


def torchrun(entry: Entry, command: str, folder: Path) -> None:
    """Run torchrun's own parser, and the run's layout for that many ranks."""
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(shlex.split(command)[1:])
    assert launch.module and launch.training_script == "megamm"
    ranks = int(launch.nnodes) * int(launch.nproc_per_node)
    words = shlex.join(["megamm", *launch.training_script_args, "--dry-run", "--world-size", str(ranks)])
    run(entry, words, folder)


def make_target(entry: Entry, command: str, folder: Path) -> None:
    """Run make's dry run: the target exists, and so do all its prerequisites."""
    done = shell(f"{command} --dry-run", ROOT)
    assert done.returncode == 0, f"{command}: {done.stdout[-500:]}"


def pip_install(entry: Entry, command: str, folder: Path) -> None:
    """Check that options are pip's and each requirement is one of megamm's, within its range, or an extra of it."""
    done = shell(f"{command} --help", folder)
    assert done.returncode == 0, done.stdout[-500:]
    requirements = [word for word in shlex.split(command)[2:] if not word.startswith("-") and word != "."]
    extras = importlib.metadata.metadata("megamm").get_all("Provides-Extra")
    ranges = {r.name.lower(): r for r in map(Requirement, importlib.metadata.requires("megamm"))}
    for requirement in map(Requirement, requirements):
        if requirement.name == "megamm":
            assert requirement.extras <= set(extras), f"{command}: no such extra"
        elif requirement.name not in ("setuptools", "wheel", "ninja"):
            own = ranges[requirement.name.lower()].specifier
            assert all(own.contains(s.version) for s in requirement.specifier), f"{command}: setup.py wants {own}"


def kustomize(entry: Entry, command: str, folder: Path) -> None:
    """Run kubectl's own rendering of the folder that is applied or deleted."""
    (target,) = re.findall(r" -k (\S+)", command)
    run(entry, f"kubectl kustomize {target}", folder)


def kubectl_without_cluster(entry: Entry, command: str, folder: Path) -> None:
    """kubectl reaches the connection, to a port without a server, so it knows every option."""
    done = shell(f"{command} --server=http://127.0.0.1:1 --request-timeout=5s", folder)
    assert "refused" in done.stdout, done.stdout


def docker_build(entry: Entry, command: str, folder: Path) -> None:
    """Check that its file and context exist; tests/test_images.py tests the file."""
    words = shlex.split(command)
    assert (folder / words[words.index("-f") + 1]).is_file(), command
    assert words[-1] == "."


def shell_syntax(entry: Entry, command: str, folder: Path) -> None:
    """Check the syntax with bash."""
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def submit(entry: Entry, command: str, folder: Path) -> None:
    """Run submit.py's own parser, and its plan of the runs."""
    code = (
        "import runpy, sys; m = runpy.run_path('launchers/slurm/submit.py');"
        "o = m['options']().parse_intermixed_args(sys.argv[1:]); print(m['runs_of'](o.config, o.overrides, o.sweep))"
    )
    run(entry, shlex.join(["python", "-c", code, *shlex.split(command)[2:]]), folder)


def slurm(entry: Entry, command: str, folder: Path) -> None:
    """Replaced by the test that has a cluster (test_documented_commands.py)."""
    raise AssertionError("needs a cluster")


HOST = {"HOST": "127.0.0.1"}
MANY = HOST | {"$": " train.global_batch_size=32 train.micro_batch_size=1"}
"""For 32 ranks with one row each: the tiny CONFIG has fewer."""
LONG = "trains for minutes by default; only a few steps here"
ENTRIES = [
    # Commands that cannot be run here as typed.
    Entry(r"make ", make_target, "runs all tests or the demo, or makes an environment: make's dry run"),
    Entry(r"pip install ", pip_install, "would download packages"),
    Entry(r"apt-get install ", shell_syntax, "changes the system"),
    Entry(r"git clone ", shell_syntax, "downloads"),
    Entry(r"megamm data fetch ", parse, "downloads public data; tests/test_fetch.py"),
    Entry(r"megamm tokenizer train text ", run, heavy=True),
    Entry(r"megamm tokenizer train visual ", run, LONG, {"$": " --steps 2 --batch-size 2"}, heavy=True),
    Entry(r"megamm tokenizer train audio ", run, LONG, {"$": " --steps 2 --batch-size 2"}, heavy=True),
    Entry(r"megamm tokenizer train points ", run, LONG, {"$": " --steps 2 --batch-size 2"}, heavy=True),
    Entry(r"megamm train .*--world-size", run, names={"CONFIG": "examples/dense_8b.yaml"}, heavy=True),
    Entry(r"megamm plan --calibrate ", run, "GPUs: refused without them", codes=(0, 2), heavy=True),
    Entry(r"megamm plan ", run, names={"CONFIG": "examples/dense_8b.yaml"}, heavy=True),
    Entry(
        r"megamm train .*--rendezvous", dry_run, "a job of several nodes; tests/test_resilience.py", MANY, heavy=True
    ),
    Entry(r"torchrun ", torchrun, "16 GPUs on two nodes", {" ... ": " --rdzv-endpoint 127.0.0.1:29400 "}, heavy=True),
    Entry(r"megamm doctor .*--nnodes", parse, "several nodes; tests/test_preflight_nodes.py", HOST),
    Entry(r"megamm doctor .*--gpus", run, "GPUs: reports an error without them", codes=(0, 1), heavy=True),
    Entry(r"python tools/parity.py --fuzz ", run, "minutes: two of the 200", {"--fuzz 200": "--fuzz 2"}, heavy=True),
    Entry(r"python tools/gpu_check.py .*--small", run, "minutes: no step", {"$": " --only video"}, heavy=True),
    Entry(r"python tools/gpu_check.py ", run, "GPUs: refused without them", codes=(0, 1, 2), heavy=True),
    Entry(r"python launchers/slurm/submit.py ", submit, "submits jobs; tests/test_slurm.py", heavy=True),
    Entry(r"kubectl (apply|delete) ", kustomize, "no cluster: rendered; tests/test_k8s_runs.py runs the pods"),
    Entry(r"kubectl ", kubectl_without_cluster, "no cluster: up to the connection"),
    Entry(r"docker build ", docker_build, "no Docker daemon; tests/test_images.py"),
    Entry(r"docker push ", shell_syntax, "no registry"),
    Entry(r"(for .*)?([A-Z_]+=\S+ )*sbatch ", slurm, "16 nodes with GPUs: sbatch --test-only on four", heavy=True),
    # Commands that are run as typed, with local meanings of the names.
    Entry(r"\$EDITOR ", run),
    Entry(r"\. launchers/slurm/cluster.env", run),
    Entry(r"\.venv/bin/python -m pytest ", run, heavy=True),
    Entry(r"\.venv/bin/pre-commit install", run, heavy=True),
    Entry(r"megamm data index FOLDER", run, names={"FOLDER": "shards/mine/train/image"}, heavy=True),
    Entry(r"megamm (convert|checkpoint) diff ", run, codes=(1,), heavy=True),
    Entry(r"megamm convert export RUN EXPORT", run, absent=("EXPORT",), heavy=True),
    Entry(r"megamm convert export \S+ export", run, absent=("export",), heavy=True),
    Entry(r"megamm convert import FOLDER RUN", run, names={"FOLDER": "EXPORT"}, absent=("RUN",), heavy=True),
    Entry(r"megamm convert modules ", run, absent=("PARTS",), heavy=True),
    Entry(r"megamm eval .*--suite ", run, absent=("report",), heavy=True),
    Entry(r"cp examples/", run),
    Entry(r"megamm runs FOLDER", run, names={"FOLDER": "runs"}, heavy=True),
    Entry(r"megamm ", run, heavy=True),
    Entry(r"python examples/train_loop.py", run, heavy=True),
]


def check(command: str, folder: Path, instead: Callable[[Entry, str, Path], None] | None = None) -> None:
    """Check every part of a command line, in order."""
    for part in parts(command):
        entry = entry_of(part)
        assert entry is not None, f"{part}: has no entry in tests/lib/documented_checks.py"
        for old, new in entry.replace.items():
            part = part + new if old == "$" else part.replace(old, new)
        (instead or entry.check)(entry, part, folder)


def parts(command: str) -> list[str]:
    """Split at `&&`; a loop stays whole."""
    return [part.strip() for part in command.split("&&")]


def is_heavy(command: str) -> bool:
    return any(entry is not None and entry.heavy for entry in map(entry_of, parts(command)))


def wants_slurm(command: str) -> bool:
    return any(entry is not None and entry.check is slurm for entry in map(entry_of, parts(command)))


def shown(command: str) -> list[str]:
    """Return the command lines that a line of a page stands for: a synopsis gives two."""
    return variants(command) if re.match(r"megamm ", command) or "[key" in command else [command]
