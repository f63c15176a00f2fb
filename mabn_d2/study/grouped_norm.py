"""Norms of a classifier that sees its images in groups."""

import functools
from collections.abc import Callable

from ..layers import BRN2d, MABN2d


def grouped_norm(name: str, images: int, norm_batch: int) -> str | Callable:
    """
    A norm for `norm_batch` of a worker's images at a time, with what counts calls as if it counted iterations.

    The options are those of configs/FashionMNIST, where the images are 32 in groups of 2: MABN's moving averages
    span one iteration, as in the paper's classification.

    Args:
        name: of a norm.
        images: of a worker, per iteration.
        norm_batch: 0 for all.

    Returns:
        what `BasicStem` and `ResNet` take as `norm`.
    """
    groups = images // (norm_batch or images)

    def per_group(momentum: float) -> float:
        return 1 - (1 - momentum) ** (1 / groups)

    if name == "MABN":
        return functools.partial(
            MABN2d, momentum=per_group(0.02), buffer_size=groups, warmup_iters=groups,
            renorm_start_iter=100 * groups,
        )  # fmt: skip
    if name == "BRN":
        return functools.partial(
            BRN2d, momentum=per_group(0.01), r_max_iters=(16 * groups, 125 * groups),
            d_max_iters=(16 * groups, 78 * groups),
        )  # fmt: skip
    return name
