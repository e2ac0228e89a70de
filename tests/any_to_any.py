"""Runs commands of `megamm` in this process, with a toy sixth modality registered: `python any_to_any.py COMMANDS`.

COMMANDS is a JSON file: a list of argument lists. Ends with the exit code of the first that fails.
"""

import json
import sys
from pathlib import Path

from toy_modality import SmellModality
from typer.testing import CliRunner

from megamm.cli import app
from megamm.modalities import REGISTRY

REGISTRY["smell"] = SmellModality

for arguments in json.loads(Path(sys.argv[1]).read_text()):
    done = CliRunner().invoke(app, arguments)
    print("$", *arguments, "\n" + done.output, flush=True)
    if done.exit_code:
        print(repr(done.exception), file=sys.stderr)
        sys.exit(done.exit_code)
