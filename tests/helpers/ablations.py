"""The norms of the study, which are registered where a test asks for them: others expect the package's alone."""

import contextlib

from mabn_d2.plugin import NORM_REGISTRY
from mabn_d2.study import ablations

ABLATIONS = {name: norm for name, norm in NORM_REGISTRY if norm.__module__ == ablations.__name__}
for _name in ABLATIONS:
    NORM_REGISTRY._obj_map.pop(_name)


@contextlib.contextmanager
def registered_ablations():
    NORM_REGISTRY._obj_map.update(ABLATIONS)
    try:
        yield
    finally:
        for name in ABLATIONS:
            NORM_REGISTRY._obj_map.pop(name)
