"""Turns a process that was forked from a warm one into a separate Python program.

Imported modules stay; everything else is set as in a new interpreter: arguments, environment, working directory,
standard files, open files, signals, search path, `__main__`, logging, and the `sitecustomize` of its PYTHONPATH.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.util
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

FORKED = ("megamm.train.ranks", "megamm.elastic.agent", "megamm.doctor.probe", "megamm.doctor.exchange")
"""Modules that a warm command forks instead of starting a new interpreter: those that import torch."""
MAY_DIFFER = (
    *("MEGAMM_FAULTS", "NODE", "PYTHONPATH", "PYTEST_", "PYTORCH_NVML_BASED_", "GLOO_SOCKET_IFNAME", "SLURM_"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_"),
)
"""Prefixes of variables that no module reads at import."""
SITE = "sitecustomize"
"""The module that an interpreter imports at its start if it finds one."""


class Environment:
    """The interpreter's initial state: the warm server fills it, every process forked from it compares with it."""

    def __init__(self) -> None:
        self.variables = dict(os.environ)
        own = self.variables.get("PYTHONPATH", "").split(os.pathsep)
        # The first entry is the folder of the server's script.
        self.path = [entry for entry in sys.path[1:] if entry not in own]
        self.filters = list(warnings.filters)


def differing(variables: Mapping[str, str], others: Mapping[str, str]) -> list[str]:
    """Return names of variables whose difference may have changed imported modules."""
    given = [{item for item in one.items() if item != ("OMP_WAIT_POLICY", "PASSIVE")} for one in (variables, others)]
    return sorted({name for name, _ in given[0] ^ given[1] if not name.startswith(MAY_DIFFER)})


def become(
    arguments: Sequence[str],
    start: Environment,
    *,
    variables: Mapping[str, str],
    folder: str | None,
    files: Sequence[int],
    kept: Collection[int] = (),
    new_session: bool = False,
) -> None:
    """Become a new process with these arguments (`-m MODULE ...` or `SCRIPT ...`), but keep the imported modules.

    files: descriptors for standard input, output and error; -1: unchanged. kept: other descriptors to keep open.
    """
    gc.freeze()  # collecting an old object would close a descriptor whose number is in use again
    _replace_files(files, kept)
    if new_session:
        os.setsid()
    if folder is not None:
        os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    _reset_signals()
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    warnings.filters[:] = start.filters
    sys.argv = list(arguments)
    sys.orig_argv = [sys.executable, *arguments]
    given = [entry for entry in variables.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = os.getcwd() if arguments[0] == "-m" else str(Path(arguments[0]).resolve().parent)
    sys.path[:] = [*given, *start.path]
    sys.modules["__main__"] = types.ModuleType("__main__")
    show_as(arguments)
    if given:
        _import_sitecustomize()
    sys.path.insert(0, first)  # an interpreter adds it after that import
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # as at import, because the forked generator is a copy


def run() -> None:
    """Execute the program that `become` has prepared, as the interpreter would."""
    if sys.argv[0] == "-m":
        module = sys.argv.pop(1)
        runpy._run_module_as_main(module)  # type: ignore[attr-defined]
        return
    main = sys.modules["__main__"]
    main.__dict__.update(__file__=sys.argv[0], __builtins__=__builtins__)
    code = compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec")
    exec(code, main.__dict__)


def run_nested() -> None:
    """Call `run` below another program's frames: end like the interpreter, without returning to them."""
    code = 1
    try:
        try:
            run()
            code = 0
        except SystemExit as ending:
            code = _exit_code(ending)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print(ending.code, file=sys.stderr)
    return 1


def _replace_files(files: Sequence[int], kept: Collection[int]) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    above = [file if file < 0 else fcntl.fcntl(file, fcntl.F_DUPFD, 3) for file in files]
    for number, file in enumerate(above):
        if file >= 0:
            os.dup2(file, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(int(name))
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]


def _reset_signals() -> None:
    """Reset handlers; a new program keeps ignored signals ignored."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and handler is not signal.default_int_handler:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


def _import_sitecustomize() -> None:
    """Import that of the PYTHONPATH, unless this process, or one that it was forked from, has executed it."""
    executed = sys.modules.pop(SITE, None)
    importlib.invalidate_caches()
    found = importlib.util.find_spec(SITE)
    if executed is not None and (found is None or found.origin == executed.__file__):
        sys.modules[SITE] = executed
    elif found is not None:
        importlib.import_module(SITE)


def show_as(arguments: Sequence[str]) -> None:
    """Show the arguments in /proc/self/cmdline, where others look for a process by its command."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    text = b"".join(word.encode() + b"\0" for word in (sys.executable, *arguments))[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


class ForkedPopen(subprocess.Popen):
    """A process of a module in FORKED, forked from this one, which must have only one thread."""

    start: Environment

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        """Support the standard library's arguments that the product uses; see subprocess.Popen._execute_child."""
        _startupinfo, _flags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest = more
        _restore_signals, _gid, _gids, _uid, _umask, new_session, _process_group = rest
        assert not shell and preexec_fn is None and executable is None and close_fds
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                show_as(args[1:])  # before others look for it
                atexit._clear()
                become(
                    args[1:],
                    self.start,
                    variables=dict(os.environ) if env is None else env,
                    folder=cwd,
                    files=(p2cread, c2pwrite, errwrite),
                    kept=pass_fds,
                    new_session=new_session,
                )
                run_nested()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def start_module_from(start: Environment):
    """Return megamm.common.processes.start_module for a warm process: it forks if that makes no difference."""
    ForkedPopen.start = start

    def start_module(module, *arguments, **options):
        command = [sys.executable, "-m", module, *arguments]
        same = (
            not differing(options.get("env") or os.environ, start.variables) and len(os.listdir("/proc/self/task")) == 1
        )
        kind = ForkedPopen if module in FORKED and same else subprocess.Popen
        return kind(command, **options)

    return start_module
