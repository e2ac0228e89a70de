"""Fixtures of several test files."""

import pytest

from megamm.parity.harness import Harness


@pytest.fixture(scope="session")
def harness():
    """One start of torch and Megatron-core for all parity cases."""
    with Harness() as harness:
        yield harness
