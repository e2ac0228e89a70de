"""The Dockerfiles of launchers/k8s/images: linted, pinned, not root, with the packages that the tests use.

They are not built here: that needs a container runtime and a registry.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import K8S, ROOT, job_spec, render
from packaging.requirements import Requirement
from requirement_files import IMPORT_NAMES_OF_EXTRAS, read_pins, setup_lists

IMAGES = sorted((K8S / "images").glob("Dockerfile*"))
CPU, GPU = "Dockerfile.cpu", "Dockerfile"


def instructions(path):
    """Return (instruction, arguments) of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def lint(path):
    command = [Path(sys.prefix) / "bin" / "hadolint", "--no-color", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_lint_of_images(tmp_path):
    assert [path.name for path in IMAGES] == [GPU, CPU]
    for path in IMAGES:
        assert lint(path) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\n")
    assert "DL3007" in lint(bad)[1]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_are_pinned_and_not_root(path):
    given = instructions(path)
    defaults = dict(text.split("=", 1) for what, text in given if what == "ARG")
    last = [i for i, (what, _) in enumerate(given) if what == "FROM"][-1]
    for what, text in given:
        if what == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], text).split()[0]
            assert re.search(r":\d+\.\d+\.\d+", image), image
    users = [text for what, text in given[last:] if what == "USER"]
    pod = job_spec(render(K8S / "overlays" / "local-cpu"))["template"]["spec"]["securityContext"]
    assert users == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]
    for what, text in given[:last]:
        if what == "COPY":
            *sources, _ = text.split()
            assert all((ROOT / source).exists() for source in sources)
            assert all(f"!{source.rstrip('/')}" in (ROOT / ".dockerignore").read_text().split() for source in sources)


def test_packages_of_images_are_the_requirements():
    """The CPU image has the requirements of setup.py and the extra "s3", as tested; the GPU image those of 3.12."""
    needed, extras = setup_lists()
    cpu, gpu = (" ".join(text for what, text in instructions(K8S / "images" / n) if what == "RUN") for n in (CPU, GPU))
    files = re.findall(r"-r requirements/(\w+)\.txt", cpu)
    assert files == ["torch", "base"] and cpu.count("-c requirements/constraints.txt") == 2
    pins = {name: version for file in files for name, version in read_pins(file).items()}
    pins |= dict(re.findall(r"([a-z0-9-]+)==([0-9.]+)", cpu))
    wanted = {Requirement(r).name.lower().replace("_", "-") for r in [*needed, *extras["s3"]]}
    assert pins.keys() == wanted | {"setuptools", "wheel"}
    assert pins.items() <= read_pins("constraints").items()
    assert re.findall(r"-r requirements/(\w+)\.txt", gpu) == ["latest"]
    more = dict(re.findall(r"([a-z0-9-]+)==([0-9.]+)", gpu))
    assert more.keys() == {IMPORT_NAMES_OF_EXTRAS["nvidia"], *(Requirement(r).name for r in extras["s3"])}
    assert more.items() <= read_pins("dev").items()
