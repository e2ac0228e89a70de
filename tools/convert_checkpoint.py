"""`megamm convert` as a script: import, export, inspect, diff, verify.

python tools/convert_checkpoint.py import FOLDER RUN
python tools/convert_checkpoint.py diff RUN FOLDER
"""

import sys

from megamm.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
