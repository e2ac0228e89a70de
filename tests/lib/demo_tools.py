"""The modules of tools/demo*.py, imported by their files, as tools/ is not a package."""

import importlib.util
import sys

from tiny_run import ROOT


def load_tool(name):
    """Load tools/NAME.py as the module NAME."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module, and the tools import each other
    spec.loader.exec_module(module)
    return module
