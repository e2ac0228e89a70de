"""Variables of other launchers in the environment: a rank of one, a pod that only has its node's, and leftovers.

What torchrun sets is taken from a real torchrun; what pods have, from Kubeflow's PyTorchJob.
"""

import json
import os
import subprocess
import sys

import pytest
from tiny_run import environment, make_data, write_config

from megamm import cli
from megamm.common.errors import UserError
from megamm.elastic import launcher, torchrun

POD = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456"}
CHILD = POD | {"LOCAL_RANK": "0"}
SHOW = "import json, os; print(json.dumps({k: v for k, v in os.environ.items()}))"


@pytest.fixture
def given(monkeypatch):
    """Set only these variables of a rank, then start as a command does; return the environment."""

    def start(variables):
        for name in (*torchrun.OF_A_RANK, "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        torchrun.take_leftovers()
        return os.environ

    yield start
    torchrun._leftovers.clear()


@pytest.mark.everything
def test_a_real_child_of_torchrun_is_a_rank(given, tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(tmp_path / "show.py")]
    done = subprocess.run(command, env=environment() | POD, capture_output=True, text=True, timeout=120, check=True)
    child = json.loads(done.stdout)
    given({name: child[name] for name in (*torchrun.OF_A_RANK, "TORCHELASTIC_RUN_ID")})
    assert torchrun.is_rank() and not torchrun.is_own_rank()
    torchrun.check_environment(1, 1, "--nproc")
    with pytest.raises(UserError, match=r"rank 0 of 1 of another launcher, which conflicts with --nproc.*unset RANK"):
        torchrun.check_environment(2, 1, "--nproc")


LEFTOVERS = [
    POD,
    {"RANK": "3"},
    {"LOCAL_RANK": "3"},
    {"WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": ""},
]


@pytest.mark.parametrize("variables", LEFTOVERS)
def test_leftovers_are_named_and_have_no_effect(given, capsys, variables):
    """Neither choose a GPU (LOCAL_RANK), nor silence errors (RANK), nor make torch wait for others (WORLD_SIZE)."""
    assert not any(name in given(variables) for name in torchrun.OF_A_RANK)
    assert not torchrun.is_rank()
    torchrun.check_environment(2, 1, "--nproc")
    named = [f"{name}={value}" for name, value in variables.items() if not name.startswith("MASTER")]
    assert all(one in capsys.readouterr().err for one in named[:1])


@pytest.mark.parametrize("variables", [{"RANK": "3", "WORLD_SIZE": "8"}, POD | {"RANK": "3", "WORLD_SIZE": "8"}])
def test_a_pod_of_several_needs_the_nodes(given, capsys, variables):
    """Each would train alone in the same folder, or wait for a rendezvous that no process has opened."""
    given(variables)
    with pytest.raises(
        UserError, match=r"not of one of its ranks \(.*LOCAL_RANK.* unset\) \(RANK=3 WORLD_SIZE=8\).*--nnodes"
    ):
        torchrun.check_environment(2, 1, "--nproc and --nnodes")
    torchrun.check_environment(2, 8, "--nproc and --nnodes")
    assert "note: ignoring RANK=3 WORLD_SIZE=8 of the environment" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"RANK": "1"}, {"RANK": "x"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "-1"}])
def test_ranks_that_cannot_be(given, wrong):
    given(CHILD | wrong)
    with pytest.raises(UserError, match="invalid environment of a rank: RANK="):
        torchrun.check_environment(1, 1, "--nproc")


def test_an_interface_that_the_node_lacks_is_one_line(given, monkeypatch):
    """Images for another cluster set it; every rank would fail in gloo, three times."""
    given({})
    for value in ("lo", "", "lo,lo"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
        torchrun.check_environment(2, 1, "--nproc")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,bond7")
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=bond7 is not a network interface.*one of .*lo"):
        torchrun.check_environment(2, 1, "--nproc")


def test_our_own_ranks_keep_their_options(given):
    given(CHILD | {"TORCHELASTIC_RUN_ID": "megamm", "RANK": "1", "WORLD_SIZE": "2"})
    torchrun.check_environment(2, 1, "--nproc")
    assert torchrun.is_own_rank()


@pytest.mark.parametrize(
    ("variables", "what"),
    [(POD | {"RANK": "3", "WORLD_SIZE": "8"}, "RANK=3 WORLD_SIZE=8"), (CHILD, "rank 0 of 1 of another launcher")],
)
def test_commands_say_it_in_one_line(given, monkeypatch, capsys, tmp_path, variables, what):
    """Before data are opened: there are none."""
    given({})
    config = write_config(tmp_path, tmp_path / "run")
    for command in (["train", config, "--nproc", 2], ["tokenizer", "train", "visual", "s", "--to", "t", "--nproc", 2]):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["megamm", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and what in error, error


@pytest.mark.everything
def test_a_pod_starts_all_its_processes(given, monkeypatch, capsys, tmp_path):
    """RANK=0 WORLD_SIZE=1 and --nproc 2: the launcher is asked for two, and its environment has neither."""
    given({})
    make_data(tmp_path)
    config = write_config(tmp_path, tmp_path / "run")
    started = []

    def supervise(run, ranks, nodes, module):
        started.append((ranks, [name for name in torchrun.OF_A_RANK if name in os.environ]))
        return 0

    monkeypatch.setattr(launcher, "supervise", supervise)
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["megamm", "train", str(config), "--nproc", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and started == [(2, [])]
    assert "note: ignoring RANK=0 WORLD_SIZE=1 of the environment" in capsys.readouterr().err
