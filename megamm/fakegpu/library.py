"""The compiled part of the simulated GPU (device.cpp): built on first use, kept in the user's cache, and loaded.

`load` must be called before the process imports torch, because torch reads what the library registers once, when its
Python module is loaded. In a GPU build of torch it replaces the device that needs a GPU.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megamm.common.errors import UserError

SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-shared", "-fPIC", "-O1", "-std=c++20")


def load() -> None:
    """Make the simulated GPU known to torch. UserError if a compiler is needed and there is none."""
    assert "torch" not in sys.modules, "torch is imported already and cannot get another device"
    own = [_torch_folder() / "lib" / f"libtorch_{kind}.so" for kind in ("cuda", "cpu")]
    # That of the GPU build brings the other one, and the last registration counts.
    for file in (next(file for file in own if file.exists()), build()):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def build() -> Path:
    """Return the compiled library, from the cache if it was built from the same source for the same torch."""
    version = importlib.metadata.version("torch")
    state = hashlib.sha256(b"\0".join([version.encode(), " ".join(FLAGS).encode(), SOURCE.read_bytes()])).hexdigest()
    file = _cache() / f"fakegpu-torch{version}-{state[:16]}.so"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _compile(file)
    return file


def _compile(file: Path) -> None:
    """Compile under a temporary name, so that processes that do so at the same time do not see a part of it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        remedy = "install one (apt-get install g++), or set CXX to its path"
        raise UserError("--fake-gpu needs a C++ compiler, and there is none", remedy=remedy)
    include = _torch_folder() / "include"
    includes = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".compiling-") as folder:
        part = Path(folder, "library.so")
        command = [compiler, *FLAGS, *includes, str(SOURCE), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no error was printed")
            remedy = f"see: {' '.join(command)}"
            raise UserError(f"--fake-gpu: {compiler} cannot compile {SOURCE.name}: {first}", remedy=remedy)
        part.rename(file)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "megamm requires torch"
    return Path(spec.origin).parent


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megamm"
