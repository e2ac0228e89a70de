"""Optional packages of metrics (the extra "eval"): imported when used, or one line that says how to install them."""

import importlib
from importlib import metadata
from typing import Any

from megamm.common.errors import UserError


def require(module: str) -> Any:
    """Import a module of an optional package. UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "pip install 'megamm[eval]', or remove this metric from the suite"
        raise UserError(f"cannot import {module}: {error}", remedy=remedy) from None


def versions(*packages: str) -> dict[str, str]:
    """Return package -> installed version."""
    return {package: metadata.version(package) for package in packages}
