"""A Detectron2 that is its Python code alone says so where its operators are asked for."""

import importlib.util

import pytest

from mabn_d2.engine.preflight.operators import check_compiled_operators

from .helpers.models import small_cfg

ASKED_FOR = [
    ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]),
    ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"),
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
    ("MODEL.ROI_HEADS.NAME", "RROIHeads"),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
]


@pytest.mark.parametrize("key, value", ASKED_FOR, ids=[key for key, _ in ASKED_FOR])
def test_what_needs_operators_that_are_not_there_is_refused_by_its_key(key, value):
    cfg = small_cfg("MABN", key, value)
    if importlib.util.find_spec("detectron2._C") is not None:
        check_compiled_operators(cfg)
        return
    with pytest.raises(ValueError) as error:
        check_compiled_operators(cfg)
    assert str(error.value).startswith(f"{key} ") and "detectron2._C" in str(error.value)


def test_a_model_without_them_is_not_refused():
    check_compiled_operators(small_cfg())
