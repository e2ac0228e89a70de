"""Requirements of setup.py and pins of requirements/, read as text."""

import ast

from packaging.utils import canonicalize_name
from tiny_run import ROOT


def setup_lists() -> tuple[list[str], dict[str, list[str]]]:
    """Return INSTALL_REQUIRES and EXTRAS_REQUIRE, read without running setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()
        if node.targets[0].id.endswith("_REQUIRE") or node.targets[0].id.endswith("_REQUIRES")
    }
    return values["INSTALL_REQUIRES"], values["EXTRAS_REQUIRE"]


def read_pins(name: str) -> dict[str, str]:
    """Return canonical package name -> version, of requirements/NAME.txt, where every line must be a pin."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pins.items()}


IMPORT_NAMES_OF_EXTRAS = {"nvidia": "nvidia-dali-cuda130"}
"""Import name -> package, where they differ and a laptop does not have it installed."""
