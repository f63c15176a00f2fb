"""Peak memory of training Mask R-CNN, as PyTorch's allocator counts it."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..utils.files import atomic_write
from .training import SIZE, measure_step

# Of a 12 GiB GPU, what is left for the allocator where CUDA's context and libraries take 1 GiB.
AVAILABLE_OF_12_GIB = 11 * 2**30


class Peak(NamedTuple):
    """The most memory that training took at a time, in bytes."""

    norm: str
    amp: bool
    images: int
    allocated: int  # by tensors
    reserved: int  # from the device, the allocator's cache included

    @property
    def fits_12_gib(self) -> bool:
        return self.reserved <= AVAILABLE_OF_12_GIB


def measure_peak(
    norm: str, config: Path, amp: bool, images: int, size: tuple[int, int] = SIZE
) -> Peak:
    """
    Trains a detector for a few steps on random images.

    Args:
        norm: the row's name.
        config: yacs config of a model with masks.
        size: height and width of the images.
    """
    cost = measure_step(config, amp, images, size, steps=1)
    return Peak(norm, amp, images, cost.allocated, cost.reserved)


HEADER = f"{'norm':<10}{'AMP':>5}{'images':>8}{'allocated GiB':>15}{'reserved GiB':>14}{'fits 12 GiB':>13}"


def format_peak(peak: Peak) -> str:
    """A line of the table."""
    return (
        f"{peak.norm:<10}{'on' if peak.amp else 'off':>5}{peak.images:>8}"
        f"{peak.allocated / 2**30:>15.2f}{peak.reserved / 2**30:>14.2f}"
        f"{'yes' if peak.fits_12_gib else 'no':>13}"
    )


def write_csv(path: Path, peaks: Iterable[Peak]) -> None:
    """Writes the peaks. An interruption leaves no half-written file."""
    with atomic_write(str(path), "w") as file:
        writer = csv.writer(file)
        writer.writerow([*Peak._fields, "fits_12_gib"])
        writer.writerows([*peak, peak.fits_12_gib] for peak in peaks)
