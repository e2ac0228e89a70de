"""Python runs this at every start while its folder is on PYTHONPATH: a run then has the faults of $MEGAMM_FAULTS."""

import os

if "MEGAMM_FAULTS" in os.environ:
    import faults

    faults.install()
