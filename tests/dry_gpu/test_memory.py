"""The count of the memory that training takes."""

from mabn_d2.benchmark.memory import measure_peak

from . import (
    compute,
    conditions,  # noqa: F401  skips without a dry GPU
)
from .__main__ import ROOT

CONFIG = ROOT / "configs/quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn_instant.yaml"
PARAMETERS = 11_791_924


def test_peak_holds_weights_gradients_and_momentum_and_grows_evenly_with_the_images():
    with compute(maps=False):
        peaks = [measure_peak("MABN", CONFIG, False, images, (256, 320)) for images in (1, 2, 3)]
    one, two, three = (peak.allocated for peak in peaks)
    assert one > 3 * 4 * PARAMETERS
    assert 0.7 < (three - two) / (two - one) < 1.3
    assert all(peak.reserved >= peak.allocated and peak.fits_12_gib for peak in peaks)
