import numpy as np
import pytest
import torch

import mabn_d2  # noqa: F401  registers the norms


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
