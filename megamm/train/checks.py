"""The check of a run's data before its ranks start: every error that can be found then is found here."""

from megamm.config import RunConfig
from megamm.convert import exportable
from megamm.data.pipeline.run_data import open_run_data


def check(config: RunConfig) -> None:
    """Open the run's data, and check that the run can be exported and can start from the weights that it names.

    Raises UserError.
    """
    vocabulary = open_run_data(config).vocabulary
    exportable.check(config, vocabulary)
    if config.init_from is not None:
        from megamm.init_from import initialize  # here, as it takes a second to import

        initialize.check(config, vocabulary)
