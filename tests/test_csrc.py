"""csrc/ compiles for Hopper and Blackwell without warnings and without register spills; the decisions of the build."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
OFTEN = "cross_entropy"
"""The kernel that nvcc compiles in the shortest time."""
HOPPER, BLACKWELL = "90a", "100a"
KERNELS = [
    pytest.param(
        path,
        arch,
        id=f"{path.stem}-{arch}",
        marks=() if (path.stem, arch) == (OFTEN, HOPPER) else pytest.mark.everything,
    )
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    for arch in (HOPPER, BLACKWELL)
]
NVCC = shutil.which("nvcc")


def setup_values():
    """Return names of setup.py without running its last call."""
    text = (ROOT / "setup.py").read_text()
    values = {"__file__": str(ROOT / "setup.py")}
    exec(text[: text.index("\nsetup(")], values)
    return values


def compiled(source, arch):
    """Return nvcc's output for a source, from build/ if the same compiler has compiled the same text there."""
    build = setup_values()
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    includes = [word for path in include_paths() for word in ("-isystem", path)]
    command = [NVCC, "-std=c++20", *build["NVCC_FLAGS"], build["STABLE_ABI"], "-DUSE_CUDA", *archs, *includes]
    command += ["-Xptxas", "-v", "-c", str(source)]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    headers = sorted(
        path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix not in (".cu", ".cpp")
    )
    state = [torch.__version__, version, *command, *(path.read_text() for path in [source, *headers])]
    said = ROOT / "build" / "nvcc" / f"{source.stem}-{hashlib.sha256(chr(0).join(state).encode()).hexdigest()[:16]}.txt"
    if not said.exists():
        said.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=said.parent) as folder:
            done = subprocess.run([*command, "-o", f"{folder}/kernel.o"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            part = Path(folder) / "said"
            part.write_text(done.stderr)
            part.rename(said)
    return said.read_text()


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(("source", "arch"), KERNELS)
def test_compiles_without_spills(source, arch):
    said = compiled(source, arch)
    assert "warning" not in said, said[-4000:]
    reports = re.findall(r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill", said, re.S)
    assert reports
    spilling = [name for name, stack, spill in reports if (stack, spill) != ("0", "0")]
    assert spilling == []


def test_arch_flags():
    flags = setup_values()["arch_flags"]
    assert flags("90a 90+PTX") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.everything
def test_install_without_a_compiler_is_whole(tmp_path):
    """A copy is built with a missing compiler: it has no library, ops: auto reports why, csrc raises an error."""
    for name in ("megamm", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / name)
    built = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", "lib"],
        cwd=tmp_path,
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    assert "csrc/ is not built: no C++ compiler (no-such-compiler)" in built.stdout
    assert not list(tmp_path.glob("lib/**/*.so"))
    script = """
import torch
from megamm import ops
from megamm.common.errors import UserError
chosen, reason = ops.choose("auto", torch.device("cpu"))
print(chosen.name, "|", reason, "|", tuple(chosen.rms_norm(torch.ones(2, 4), torch.ones(4)).shape))
try:
    ops.choose("csrc", torch.device("cpu"))
except UserError as error:
    print(error)
"""
    used = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "lib",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
    )
    first, second = used.stdout.splitlines()
    assert first == "torch | csrc/ was not built | (2, 4)"
    assert "ops: csrc, but csrc/ was not built" in second


def test_the_build_here_has_the_kernels_of_this_machine():
    built = setup_values()["extensions"]()
    sources = built["ext_modules"][0].sources
    assert "csrc/cpu/rms_norm.cpp" in sources
    assert any(name.endswith(".cu") for name in sources) == bool(torch.version.cuda and NVCC)
