"""Seeds and states of the random number generators."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_from(*numbers: int) -> int:
    """A seed in [0, 2**32) that depends on all of the numbers."""
    return int(np.random.SeedSequence([int(n) % 2**32 for n in numbers]).generate_state(1)[0])


def random_state() -> tuple:
    """The state of Python's, numpy's and PyTorch's generators, the GPU's where it is in use."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple) -> None:
    """Puts the generators into a state of :func:`random_state`."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state(state[3])


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Puts all generators back at the end."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextlib.contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and PyTorch's CPU generator, and puts them back at the end."""
    with keep_random_state():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
