"""Builds what a config describes, without memory for its weights, to see whether it can be built."""

import contextlib
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from ...statistics import select_norms
from ...utils.command_line import one_line

T = TypeVar("T")


def build(what: str, function: Callable[[torch.device], T]) -> T:
    """
    Args:
        what: names in the message what is built and from which keys.
        function: builds it on the device that it is given.

    Returns:
        what the function returns.

    Raises:
        ValueError: it cannot be built.
    """
    with quiet():
        try:
            # Tensors without memory: a fifth of a second for a ResNet-50.
            with torch.device("meta"):
                return function(torch.device("meta"))
        except Exception:  # of a constructor that reads the values of its tensors, or a true one
            try:
                return function(torch.device("cpu"))
            except Exception as error:  # whatever the wrong value stumbled over
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise ValueError(
                    f"{what} cannot be built: {one_line(error)}, at `{place.line}` "
                    f"({os.path.basename(place.filename)}, line {place.lineno})"
                ) from error


def check_layers(model: torch.nn.Module, layers: Iterable[str], key: str) -> None:
    """
    Raises:
        ValueError: a pattern matches no norm of the model; the message begins with the key.
    """
    try:
        select_norms(model, layers)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without log lines and warnings: they come again when the training builds the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
