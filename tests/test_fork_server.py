"""The fork server, with this process in the role of its launcher: it provides prefork parents after any failure."""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from megamm.common import device as devices
from megamm.common import processes
from megamm.common.errors import UserError
from megamm.elastic import fork_server
from megamm.elastic.fork_server import CheckFailed, ForkServer
from megamm.elastic.prefork import PreforkParent
from megamm.elastic.rank_status import HeartbeatPage

CONFIG = {"device": "cpu", "engine": "native"}
LIB = Path(__file__).parent / "lib"
# Fakes of installed packages that initialise the GPU when they are imported, as Transformer Engine can: Megatron-core
# imports what it finds, and forks of such a process cannot use the GPU.
LOG = """
import os
with open(os.environ["IMPORTED"], "a") as file:
    file.write(f"{__name__} {os.getpid()}\\n")
raise ModuleNotFoundError("the rest of the package")  # so that Megatron-core does without it
"""
BY_TORCH = "import torch; torch.cuda._initialized = True\n" + LOG
RANKS = """
import torch
torch.cuda.is_available = lambda: True  # as with a GPU: the fork server must not know that there is none
from megamm.train import ranks
ranks.main()
"""


class Launcher:
    """A fork server, from which prefork parents are requested as agents do."""

    def __init__(self, config, module="megamm.train.ranks"):
        self.before = processes.children(os.getpid())
        self.server = ForkServer(module, config)

    def prefork_parents(self):
        return [p for p in processes.children(os.getpid()) if p not in (*self.before, self.server.pid)]

    def ask(self):
        """Return the agent's end of a new prefork parent's socket."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [os.dup(its.fileno()), os.dup(HeartbeatPage.create(1).descriptor), os.memfd_create("stacks")]
        self.server.fork(b'{"ranks": 1}', given)
        its.close()
        return ours

    def answer(self, parent, seconds=60):
        """Return the prefork parent's answer to an order to sweep; "" if it is gone."""
        try:
            parent.send(b'{"sweep": true}')
        except BrokenPipeError:
            return ""
        end = time.monotonic() + seconds
        parent.settimeout(0.05)
        while time.monotonic() < end:
            self.server.attend()
            try:
                return parent.recv(4096).decode()
            except TimeoutError:
                continue
            except ConnectionResetError:
                return ""
        return "nothing"

    def wait(self, what, seconds=60):
        end = time.monotonic() + seconds
        while not what():
            self.server.attend()
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def launcher(monkeypatch):
    """Return a function that makes one from a config and a module; those of tests/lib can be named too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(LIB), os.environ.get("PYTHONPATH")])))
    processes.adopt_orphans()
    made = []

    def make(*arguments):
        made.append(Launcher(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.server.close()
        processes.sweep(one.before)
    processes.adopt_orphans(False)


def test_prefork_parents_outlive_their_fork_server_and_come_from_another(launcher, monkeypatch, capfd):
    it = launcher(CONFIG, "light_ranks")
    first = it.ask()  # before it has imported anything
    assert json.loads(it.answer(first)) == {"swept": 0}
    (parent,) = it.prefork_parents()

    for _ in range(2):  # the second one has hardly begun to import
        old = it.server.pid
        os.kill(old, signal.SIGKILL)
        it.wait(lambda old=old: it.server.pid not in (None, old))
    assert json.loads(it.answer(first)) == {"swept": 0} and it.prefork_parents() == [parent]

    second = it.ask()
    assert json.loads(it.answer(second)) == {"swept": 0}
    it.wait(lambda: it.server._request is None)  # it has also answered
    stopped = it.server.pid
    os.kill(stopped, signal.SIGSTOP)
    third = it.ask()
    with monkeypatch.context() as patch:  # only while it is stopped: others may be slow on a busy machine
        patch.setattr(fork_server, "ANSWER_SECONDS", 0.1)
        it.wait(lambda: it.server.pid not in (None, stopped))
    assert json.loads(it.answer(third)) == {"swept": 0}  # from the next one, although requested from the stopped one
    assert len(it.prefork_parents()) == 3
    for ours in (first, second, third):
        ours.close()
    it.wait(lambda: all(processes.state(p) == "Z" for p in it.prefork_parents()))
    said = capfd.readouterr().err
    assert said.count("fork server died") == 2 and said.count("fork server is not responding") == 1


def leave_a_worker(*_):
    """The rank's program: its child is stopped while it hands over a tensor, and the rank ends."""
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    Path(f"/dev/shm/torch_{child}_1_0").touch()
    os._exit(child % 200)


def test_what_a_killed_worker_leaves_in_shared_memory_is_removed():
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    page, dump = HeartbeatPage.create(1).descriptor, os.memfd_create("stacks")
    parent = os.fork()
    if parent == 0:
        ours.close()
        processes.adopt_orphans()
        with contextlib.suppress(BaseException):
            PreforkParent(leave_a_worker, CONFIG, its, page, [dump]).serve()
        os._exit(0)
    its.close()
    before = set(Path("/dev/shm").iterdir())
    ours.send(json.dumps({"start": [{"RANK": "0"}]}).encode())
    answers = [json.loads(ours.recv(4096)) for _ in range(2)]
    assert "started" in answers[0] and "exited" in answers[1]
    left = [path for path in set(Path("/dev/shm").iterdir()) - before if path.match("torch_*_1_0")]
    (path,) = [path for path in left if int(path.name.split("_")[1]) % 200 == answers[1]["status"]]
    ours.send(b'{"sweep": true}')
    assert json.loads(ours.recv(4096)) == {"swept": 1} and not path.exists()
    ours.close()
    assert os.waitpid(parent, 0)[1] == 0


def test_one_that_cannot_import_is_tried_again_only_when_asked(launcher, capfd):
    it = launcher({"device": "cpu"})  # its engine is missing
    it.wait(lambda: it.server.pid is None)
    for _ in range(2):
        parent = it.ask()
        assert it.server.pid is not None
        assert it.answer(parent) == ""
        it.wait(lambda: it.server.pid is None)
        assert it.prefork_parents() == []
    assert capfd.readouterr().err.count("fork server died") == 3


CHECKING_RANKS = """
import os, signal, socket, sys
from pathlib import Path
from megamm.common.errors import UserError
from megamm.elastic import prefork

def check(config):
    with open(config["log"], "a") as log:
        log.write("checked\\n")
    if config["ends"] == "refuses":
        raise UserError("no data", where=Path("/nowhere"), remedy="build it")
    if config["ends"] == "full":
        raise OSError(28, "No space left on device", "/full/disk")
    if config["ends"] == "fails":
        raise ZeroDivisionError("of this program")
    if config["ends"] == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)

def preload(config, start_check):
    if "again" not in sys.argv:
        start_check(check)
        if config["ends"] == "is replaced":
            os.execv(sys.executable, [*sys.orig_argv, "again"])

def rank(_config):
    raise AssertionError("these tests start no ranks")

prefork.serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), preload, rank)
"""


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        ("accepts", None),
        ("is replaced", None),
        ("refuses", "no data (/nowhere); build it"),
        ("full", "No space left on device"),
        ("fails", "ZeroDivisionError"),
        ("is killed", "signal 9 (SIGKILL)"),
    ],
)
def test_a_config_is_checked_once_beside_the_imports(tmp_path, monkeypatch, capfd, ends, error):
    """Its errors reach the launcher as they were; a process that the imports replace does not check again."""
    (tmp_path / "checking_ranks.py").write_text(CHECKING_RANKS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    server = ForkServer("checking_ranks", {"log": str(tmp_path / "log"), "ends": ends}, has_check=True)
    try:
        if error is None:
            server.check()
            while not server._is_ready:
                server.attend()
        else:
            of_user = ends in ("refuses", "full")
            with pytest.raises(UserError if of_user else CheckFailed) as raised:
                server.check()
            assert error in str(raised.value)
            assert ("Traceback" in capfd.readouterr().err) == (ends == "fails")
        assert (tmp_path / "log").read_text() == "checked\n"
    finally:
        server.close()


@pytest.mark.everything
@pytest.mark.parametrize(
    ("packages", "is_replaced"),
    [
        ({"transformer_engine": BY_TORCH, "flash_attn": BY_TORCH}, True),
        ({"transformer_engine": LOG, "flash_attn": LOG}, False),
    ],
)
def test_packages_that_touch_the_gpu_are_left_to_the_ranks(
    launcher, monkeypatch, tmp_path, capfd, packages, is_replaced
):
    for name, source in packages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
    (tmp_path / "gpu_ranks.py").write_text(RANKS)
    imported = tmp_path / "imported"
    monkeypatch.setenv("IMPORTED", str(imported))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    it = launcher({"device": "gpu", "engine": "native"}, "gpu_ranks")
    server = it.server.pid
    parent = it.ask()
    assert json.loads(it.answer(parent, 240)) == {"swept": 0}, capfd.readouterr().err
    assert it.server.pid == server, "it has not died"
    # The first process imported them, once each; its replacement, of the same id, and the prefork parent did not.
    assert sorted(set(imported.read_text().split("\n")) - {""}) == sorted(f"{name} {server}" for name in packages)
    assert len(it.prefork_parents()) == 1
    with open(f"/proc/{server}/cmdline", "rb") as file:
        assert (b"without-megatron" in file.read()) == is_replaced
    assert ("initialises the GPU when imported" in capfd.readouterr().err) == is_replaced
    parent.close()


def test_a_gpu_that_torch_did_not_initialise_is_noticed(monkeypatch):
    assert not devices.is_initialized()
    monkeypatch.setattr(devices, "UNIFIED_MEMORY", "/dev/zero")
    with open("/dev/zero", "rb"):
        assert devices.is_initialized()
    assert not devices.is_initialized()
