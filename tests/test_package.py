"""The sdist and the wheel: their contents, running without a checkout, and the supported Python versions."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename
from tiny_run import ROOT

import megamm
from megamm.__main__ import SUPPORTED
from megamm.ops import library

SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "NOTICE", "README.md")
FOLDERS = ("megamm", "csrc", "examples", "launchers")
GENERATED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in a clean environment: no thread counts, no Python paths, nothing of pytest."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH") if name in os.environ}
    words = list(map(str, command))
    return subprocess.run(words, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=600)


def python_range() -> str:
    """Return python_requires of setup.py."""
    (wanted,) = re.findall(r'^PYTHON_REQUIRES = "(.+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    return wanted


# --- contents ---


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Return a folder with the sdist of a copy of the sources, and the wheel made from that sdist."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=GENERATED)
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def files_of(*folders: str) -> set[str]:
    """Return the checkout's files below these folders, without generated ones."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    kept = (path for path in found if "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc"))
    return {path.relative_to(ROOT).as_posix() for path in kept}


@pytest.mark.everything
def test_the_wheel_has_what_runs_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    name, version, _, tags = parse_wheel_filename(wheel.name)
    assert (name, str(version)) == ("megamm", megamm.__version__)
    (tag,) = tags
    has_kernels = library.FILE.exists()  # whether they can be built here
    assert (tag.interpreter, tag.abi) == ("py3", "none")
    assert tag.platform == "any" if not has_kernels else tag.platform.startswith("linux_")
    with zipfile.ZipFile(wheel) as archive:
        members = set(archive.namelist())
        metadata = archive.read(f"megamm-{version}.dist-info/METADATA").decode()
    inside = {m for m in members if ".dist-info/" not in m}
    data = f"megamm-{version}.data/data/share/megamm/"
    wanted = files_of("megamm") | {data + f for f in files_of("examples", "launchers")}
    assert inside == wanted | ({f"megamm/{library.FILE.name}"} if has_kernels else set())
    assert SpecifierSet(re.findall(r"^Requires-Python: (.+)$", metadata, re.MULTILINE)[0]) == SpecifierSet(
        python_range()
    )


@pytest.mark.everything
def test_the_sdist_has_what_the_wheel_is_made_of(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of(*FOLDERS) | set(SOURCES) <= members
    assert not [name for name in members if name.startswith(("tests", "tools", "out", "dist"))]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """Return an environment with the wheel, which sees the packages of this one but not the checkout."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "packages.pth").write_text(f"{packages}\n")  # its .pth files are not followed
    (wheel,) = built.glob("*.whl")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
    )
    done = run(*pip, wheel, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.everything
def test_it_runs_without_a_checkout(installed, tmp_path):
    """Run the command, the doctor and the example, from an empty folder."""
    python, command = installed / "bin" / "python", installed / "bin" / "megamm"
    where = run(python, "-c", "import megamm; print(megamm.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(installed)), where
    helped = run(command, "--help", cwd=tmp_path)
    assert helped.returncode == 0 and "tokenizer" in helped.stdout, helped.stderr
    doctor = run(command, "doctor", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    share = installed / "share" / "megamm"
    assert re.search(rf"^examples, launchers +{share}$", doctor.stdout, re.MULTILINE), doctor.stdout
    assert re.search(rf"^megamm +{megamm.__version__}$", doctor.stdout, re.MULTILINE)
    if library.FILE.exists():
        assert re.search(r"^fused ops +.*csrc", doctor.stdout, re.MULTILINE), doctor.stdout
    trained = run(python, share / "examples" / "train_loop.py", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    verified = run(command, "checkpoint", "verify", "train_loop/run", cwd=tmp_path)
    assert verified.returncode == 0 and "step_00000060: valid" in verified.stdout, verified.stdout + verified.stderr
    assert os.access(share / "launchers" / "slurm" / "pretrain_mm.sh", os.X_OK) == os.access(
        ROOT / "launchers" / "slurm" / "pretrain_mm.sh", os.X_OK
    )


# --- other versions of Python ---


def interpreter(version: str) -> str:
    """Return an interpreter of that version, on PATH or from pyenv; skip the test if there is none."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        if run(candidate, "-c", "", cwd=ROOT).returncode == 0:
            return str(candidate)
    pytest.skip(f"no Python {version} here")


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_another_python_gets_one_line(version, tmp_path):
    """The command reports it before it imports optional packages, and make before it creates anything."""
    python = interpreter(version)
    for name in ("Makefile", "setup.py", "tools", "megamm", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in ((python, "-m", "megamm", "--help"), ("make", "--no-print-directory", "venv", f"PYTHON={python}")):
        done = run(*command, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
        assert len(lines) == 1 and "3.11 or 3.12" in lines[0] and version in lines[0], done.stderr
        assert not done.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.everything
@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_another_python_installs_nothing(version, built, tmp_path):
    """pip prints its own line, from python_requires."""
    (wheel,) = built.glob("*.whl")
    python = interpreter(version)
    pip = (
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        tmp_path,
    )
    done = run(*pip, wheel, cwd=tmp_path)
    assert done.returncode != 0 and "requires a different Python" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_supported_versions_agree():
    """setup.py for pip, __main__.py for the command, system_packages.sh for make."""
    admitted = [(3, minor) for minor in range(6, 20) if f"3.{minor}.1" in SpecifierSet(python_range())]
    assert admitted == list(SUPPORTED)
    names = [f"3.{minor}" for _, minor in SUPPORTED]
    script = (ROOT / "tools" / "system_packages.sh").read_text()
    assert f'supported="{" or ".join(names)}"' in script and f'\n{" | ".join(names)} | "") ;;' in script


def test_images_have_the_version_in_their_names():
    texts = {path: path.read_text() for path in (ROOT / "launchers" / "k8s").rglob("*") if path.is_file()}
    named = {tag for text in texts.values() for tag in re.findall(r"megamm:(\d[\w.]*)", text)}
    assert named == {megamm.__version__}
