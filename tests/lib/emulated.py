"""The sources of csrc/cuda built for a CPU (tests/lib/emulation/cuda.h), as torch.ops.megamm_emulated.

They are built into build/ once per state of the sources: `make venv` runs this file, tests build what has changed
since. This needs the C++ compiler that built csrc/.
"""

import fcntl
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "tests/lib/emulation/cuda.h"
FLAGS = [
    *["-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unused-function", "-Wno-unknown-pragmas"],
    *["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DMEGAMM_LIBRARY=megamm_emulated", "-DMEGAMM_CUDA_KEY=CPU"],
]


# `make sanitize` checks every memory access, also to tensors.
if os.environ.get("MEGAMM_SANITIZE"):
    FLAGS += ["-g", "-fsanitize=address"]


@cache
def load() -> SimpleNamespace:
    """Return torch.ops.megamm_emulated."""
    sources = [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    read = [HEADER, Path(__file__), *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    state = hashlib.sha256(b"\0".join([f"{torch.__version__} {FLAGS}".encode(), *(path.read_bytes() for path in read)]))
    folder = ROOT / "build" / f"emulated-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "library.so").exists():
            _build(sources, folder)
    torch.ops.load_library(folder / "library.so")
    return torch.ops.megamm_emulated


def _build(sources: list[Path], folder: Path) -> None:
    """Compile one object per source in parallel, then the library, which gets its name when it is complete."""
    compiler = os.environ.get("CXX", "c++")
    includes = [word for path in include_paths() for word in ("-isystem", path)]
    jobs = {
        folder / f"{source.stem}.o": [*FLAGS, *includes, "-include", str(HEADER), "-x", "c++", "-c", str(source)]
        for source in sources
    }
    running = [subprocess.Popen([compiler, *command, "-o", str(to)]) for to, command in jobs.items()]
    assert [process.wait() for process in running] == [0] * len(running), "building the kernels for a CPU failed"
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    part = folder / "library.part"
    subprocess.run([compiler, "-shared", *map(str, jobs), *libraries, "-o", str(part)], check=True)
    part.rename(folder / "library.so")


if __name__ == "__main__":
    load()
