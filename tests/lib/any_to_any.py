"""Runs commands of `megamm` in this process with a toy sixth modality: `python any_to_any.py COMMANDS`.

COMMANDS is a JSON file: a list of argument lists.
"""

import json
import sys
from pathlib import Path

from toy_modality import SmellModality

from megamm.cli import app
from megamm.modalities import REGISTRY

if __name__ == "__main__":
    REGISTRY["smell"] = SmellModality
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        print("$", *arguments, flush=True)
        app(arguments, standalone_mode=False)
