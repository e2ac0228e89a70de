"""`megamm doctor`: what this machine and installation offer a run, and their problems.

No part of a run is started, GPUs are only asked for their names, and Megatron-core is not imported.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

import megamm
from megamm import ops
from megamm.checkpoint.state import code_version
from megamm.common import device
from megamm.common.processes import SHARED_MEMORY
from megamm.config import accelerators
from megamm.ops import library

REASONS = {"psutil": "without it Megatron-core hangs forever when it saves a checkpoint"}
"""Package -> what fails without it, if that is not obvious."""


@dataclass(frozen=True)
class Fault:
    """A problem and its fix."""

    what: str
    remedy: str


@dataclass(frozen=True)
class InstallationReport:
    """Findings (subject -> text, in the order of printing) and problems."""

    findings: dict[str, str]
    faults: list[Fault]

    def show(self) -> bool:
        """Print the report, on a terminal as a table of its width; return whether there are no problems."""
        console = Console()
        rows = list(self.findings.items()) + [("problem", f"{f.what}; {f.remedy}") for f in self.faults]
        if not self.faults:
            rows.append(("problems", "none"))
        if console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for name, text in rows:
                table.add_row(Text(name, "bold red" if name == "problem" else "bold"), Text(text))
            console.print(table)
        else:
            width = max(len(name) for name, _ in rows)
            console.file.write("".join(f"{name:<{width}}  {text}\n" for name, text in rows))
        return not self.faults


def examine() -> InstallationReport:
    """Examine everything; takes a second or two, mostly to import torch."""
    found = accelerators.installed()
    is_gpu = bool(device.gpus())
    gradients = accelerators.weight_gradients(found, is_gpu=is_gpu, engine="native")
    findings = {
        **_software(),
        **_machine(),
        **_compilers(),
        "fused ops": ops.describe(),
        **accelerators.describe(found, is_gpu=is_gpu, engine="native", gradients=gradients),
        **_space(),
    }
    faults = [*_package_faults(), *_ops_faults(), *_device_faults(), *_accelerator_faults(found, is_gpu)]
    return InstallationReport(findings, faults)


def versions() -> dict[str, str]:
    """Return the versions that can change a run's results or how its ranks communicate; skips absent packages."""
    packages = {needed.name: _version(needed.name) for needed in _requirements()}
    library_ = hashlib.sha256(library.FILE.read_bytes()).hexdigest()[:12] if library.FILE.exists() else "not built"
    return {
        "python": platform.python_version(),
        "megamm": code_version(),
        "fused ops": library_,
        "driver": device.driver_version() or "none",
        **{name: version for name, version in packages.items() if version is not None},
    }


def _software() -> dict[str, str]:
    ranges = {r.name: str(r.specifier) for r in _requirements()}
    return {
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "megamm": megamm.__version__,
        "examples, launchers": str(_shared_folder() or "not installed"),
        "torch": f"{torch.__version__}, built for {device.torch_build()}",
        "megatron-core": f"{_version('megatron-core') or 'not installed'}, "
        f"supported {ranges.get('megatron-core', 'unknown')}",
    }


def _shared_folder() -> Path | None:
    """Find examples/ and launchers/: in the checkout, else where pip installed them; None if it did not."""
    checkout = Path(megamm.__file__).parents[1]
    if (checkout / "launchers").is_dir():
        return checkout
    try:
        files = importlib.metadata.files("megamm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        environment, found, _ = str(Path(file.locate()).resolve()).rpartition("/share/megamm/launchers/")
        if found:
            return Path(environment) / "share" / "megamm"
    return None


def _machine() -> dict[str, str]:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = device.gpus()
    return {
        "CPU": f"{cores} cores, {memory:.0f} GiB, torch uses {torch.backends.cpu.get_cpu_capability()}, "
        f"threads of a process: {threads}",
        **{f"GPU {i}": gpu for i, gpu in enumerate(gpus)},
        **({} if gpus else {"GPU": "torch sees none"}),
        "driver": device.driver_version() or "no NVIDIA driver is loaded",
    }


def _compilers() -> dict[str, str]:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return {
        "C++ compiler": compiler or "not found",
        "nvcc": device.gpu_compiler() or "not found",
        "ninja": shutil.which("ninja") or "not found",
    }


def _space() -> dict[str, str]:
    here = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free in this folder"
    shared = f"{shutil.disk_usage(SHARED_MEMORY).free / 2**30:.1f} GiB" if SHARED_MEMORY.exists() else "none"
    return {"disk": here, "shared memory": f"{shared} free"}


def _requirements() -> list[Requirement]:
    """Return the requirements of the installed megamm and its extras except "dev"; empty if it is not installed."""
    try:
        texts = importlib.metadata.requires("megamm") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(text) for text in texts]
    return [r for r in parsed if r.marker is None or not r.marker.evaluate({"extra": "dev"})]


def _package_faults() -> Iterator[Fault]:
    """Find packages that are missing or out of range; packages of extras may be missing."""
    if _version("megamm") is None:
        yield Fault(
            "megamm is not installed, so the versions that it needs are unknown",
            "run in its folder: pip install --no-build-isolation -e .",
        )
    for needed in _requirements():
        version, optional = _version(needed.name), needed.marker is not None
        reason = f": {REASONS[needed.name]}" if needed.name in REASONS else ""
        remedy = f'pip install "{needed.name}{needed.specifier}"'
        if version is None and not optional:
            yield Fault(f"{needed.name} is not installed{reason}", remedy)
        elif version is not None and not needed.specifier.contains(version, prereleases=True):
            yield Fault(f"{needed.name} {version} is not supported, use {needed.specifier}", remedy)
    installed = _version("torch")
    if installed is not None and Version(installed).public != Version(torch.__version__).public:
        yield Fault(
            f"torch {torch.__version__} is imported ({Path(torch.__file__).parent}), but {installed} is installed",
            "uninstall one of them",
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ops_faults() -> Iterator[Fault]:
    """Find a compiled library that does not load, for example because it was built for another torch."""
    if library.FILE.exists() and (failure := library.load()):
        yield Fault(failure, library.REMEDY)


def _device_faults() -> Iterator[Fault]:
    """Find a GPU that torch cannot use."""
    driver = device.driver_version()
    if driver is None or device.gpus():
        return
    if device.torch_build() == "CPU":
        yield Fault(f"a GPU driver ({driver}) is loaded, but torch is built for CPU", "install a GPU build of torch")
    else:
        yield Fault(
            f"torch, built for {device.torch_build()}, finds no GPU with driver {driver}",
            "check nvidia-smi; update the driver, or install a torch built for an older one",
        )


def _accelerator_faults(found: accelerators.Installed, is_gpu: bool) -> Iterator[Fault]:
    """Find packages that stop a run on a GPU by being installed, because Megatron-core uses them automatically."""
    if not is_gpu:
        return
    if found.transformer_engine:
        # In a separate process: an import that fails may crash the process.
        tried = subprocess.run(
            [sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True, text=True
        )
        if tried.returncode:
            said = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
            yield Fault(
                f"importing Transformer Engine fails, and Megatron-core with it: {said}", "reinstall or uninstall it"
            )
    elif found.apex and not found.apex_kernels:
        yield Fault(
            "apex is installed without its kernels, so Megatron-core's Adam fails",
            "build apex with its C++ and GPU extensions, or uninstall it",
        )
