"""What holds for all tests of this folder."""

import pytest

from mabn_d2.ops import modes


@pytest.fixture(autouse=True)
def constants_have_values():
    """Those that a test has made outside of `compute()` do not."""
    modes._constants.clear()
