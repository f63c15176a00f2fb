import importlib.util
import logging
import signal

import numpy as np
import pytest
import torch

import mabn_d2  # noqa: F401  registers the norms

# The models of the tests are small; threads that wait for one another on a busy machine cost more.
torch.set_num_threads(1)

# A shell's background jobs ignore SIGINT, and the processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def open_streams_only():
    """What an earlier test made a logger write to is closed, and each line to it would be an error."""
    for logger in (logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        for handler in logger.handlers[:]:
            if getattr(getattr(handler, "stream", None), "closed", False):
                logger.removeHandler(handler)


def pytest_collection_modifyitems(items):
    """Detectron2 runs without its compiled operators, but for deformable convolution."""
    if importlib.util.find_spec("detectron2._C") is None:
        skip = pytest.mark.skip(
            reason="deformable convolution needs detectron2._C, which this Detectron2 lacks"
        )
        for item in items:
            if "deform" in item.nodeid or "dconv" in item.nodeid:
                item.add_marker(skip)
