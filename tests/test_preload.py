"""The fork server with installed packages that initialise the GPU when they are imported, as in NVIDIA's images.

The fakes do what Transformer Engine does: Megatron-core imports what it finds, and the GPU is then initialised in the
process that forks the ranks. Forks of such a process cannot use it.
"""

import json
import os

import pytest
from test_fork_server import launcher as launcher

from megamm.common import device as devices

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


@pytest.mark.parametrize(
    ("packages", "is_replaced"),
    [
        ({"transformer_engine": BY_TORCH, "flash_attn": BY_TORCH}, True),
        pytest.param({"transformer_engine": LOG, "flash_attn": LOG}, False, marks=pytest.mark.everything),
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
