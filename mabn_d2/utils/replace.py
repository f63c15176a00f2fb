"""Replacement of functions in other packages."""

import logging
import sys
from collections.abc import Callable

logger = logging.getLogger(__name__)


def replace_everywhere(old: Callable, new: Callable) -> None:
    """Replaces a function in every imported module that holds it, under whatever name."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                logger.debug("%s.%s is replaced", module.__name__, name)
                setattr(module, name, new)
