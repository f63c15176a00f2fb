"""
What the keys of Detectron2's config accept.

yacs compares types with the default's, but takes `None` for anything, anything for a default of `None`,
any element in a list, and a group of keys for another. What is wrong is found here, by name, instead of
by a `TypeError` after the workers have started.
"""

import fnmatch
import math
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from fvcore.common.registry import Registry
from PIL import Image

from ...checkpoint import WEIGHTS_IMPORT
from ...layers.options import Accepted, is_integer, is_number
from ...plugin import NORM_REGISTRY, add_mabn_config

BOOLEAN = Accepted("True or False", lambda value: isinstance(value, bool))
INTEGER = Accepted("an integer", is_integer)
NUMBER = Accepted("a number", is_number)
STRING = Accepted("a string", lambda value: isinstance(value, str))
NON_EMPTY_STRING = Accepted("a non-empty string", lambda v: isinstance(v, str) and v != "")
POSITIVE_INTEGER = Accepted("a positive integer", lambda v: is_integer(v) and v > 0)
NON_NEGATIVE_INTEGER = Accepted("a non-negative integer", lambda v: is_integer(v) and v >= 0)
POSITIVE_NUMBER = Accepted("a positive number", lambda v: is_number(v) and v > 0)
NON_NEGATIVE_NUMBER = Accepted("a non-negative number", lambda v: is_number(v) and v >= 0)
FRACTION = Accepted("a number in [0, 1]", lambda v: is_number(v) and 0 <= v <= 1)
# numpy's generators take no larger seed, and each worker adds its rank to it.
SEED = Accepted("an integer below 4294000000", lambda v: is_integer(v) and v < 4294000000)
IOU_LABEL = Accepted("-1, 0 or 1", lambda value: is_integer(value) and value in (-1, 0, 1))


def one_of(*choices) -> Accepted:
    """One of the values themselves; 1 and True are different ones."""
    words = " or ".join(map(repr, choices))
    return Accepted(words, lambda v: any(v == c and type(v) is type(c) for c in choices))


def name_in(registry: Registry, *more: str) -> Accepted:
    """The name of what is registered at the time of the check."""
    return Accepted(
        f"a name in Detectron2's registry {registry._name}",
        lambda v: isinstance(v, str) and (v in more or v in registry),
    )


def list_of(element: Accepted, *lengths: int, at_least: int = 0) -> Accepted:
    """Elements of one kind, their number one of `lengths` if there are any."""
    counts = f"{' or '.join(map(str, lengths))} elements" if lengths else "elements"
    counts = f"at least {at_least} element" if at_least else counts
    return Accepted(
        f"a list of {counts}, each {element.words}",
        lambda v: (
            isinstance(v, (list, tuple))
            and (len(v) in lengths if lengths else len(v) >= at_least)
            and all(map(element.test, v))
        ),
    )


def either(first: Accepted, second: Accepted) -> Accepted:
    return Accepted(f"{first.words}, or {second.words}", lambda v: first.test(v) or second.test(v))


def _is_device(value) -> bool:
    try:
        return isinstance(value, str) and bool(torch.device(value))
    except RuntimeError:
        return False


def _is_expected_result(value) -> bool:
    kinds = (STRING, STRING, NUMBER, NON_NEGATIVE_NUMBER)
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(
        kind.test(v) for kind, v in zip(kinds, value)
    )  # fmt: skip


DEVICE = Accepted("a device of PyTorch, such as 'cuda' or 'cpu'", _is_device)
_LOSS_TYPE = one_of("smooth_l1", "giou", "diou", "ciou")
_BOX_WEIGHTS = list_of(POSITIVE_NUMBER, 4, 5)  # 5 for rotated boxes
_PIL_MODES = one_of("BGR", "YUV-BT.601", *Image.MODES)

# A key itself counts before a pattern, and the first pattern that matches before the others. What no
# pattern matches accepts values of its default's type.
_ACCEPTED: dict[str, Accepted] = {
    "VERSION": one_of(2),
    "OUTPUT_DIR": NON_EMPTY_STRING,
    "SEED": SEED,
    "STATISTICS.LAYERS": list_of(NON_EMPTY_STRING, at_least=1),
    "STATISTICS.PERIOD": POSITIVE_INTEGER,
    "VIS_PERIOD": NON_NEGATIVE_INTEGER,
    "GLOBAL.HACK": Accepted("1.0, for nothing reads it", lambda value: value == 1.0),
    "DATALOADER.NUM_WORKERS": NON_NEGATIVE_INTEGER,
    "DATALOADER.REPEAT_THRESHOLD": NON_NEGATIVE_NUMBER,
    # Detectron2's others need keys that its config does not have.
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATASETS.*_TOPK_*": POSITIVE_INTEGER,
    "DATASETS.*": list_of(NON_EMPTY_STRING),
    "INPUT.CROP.SIZE": list_of(POSITIVE_NUMBER, 2),
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.FORMAT": _PIL_MODES,
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.MAX_SIZE_*": POSITIVE_INTEGER,
    "INPUT.MIN_SIZE_TEST": NON_NEGATIVE_INTEGER,
    "INPUT.MIN_SIZE_TRAIN": list_of(NON_NEGATIVE_INTEGER, at_least=1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "MODEL.ANCHOR_GENERATOR.ANGLES": list_of(list_of(NUMBER)),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": list_of(list_of(POSITIVE_NUMBER)),
    "MODEL.ANCHOR_GENERATOR.NAME": name_in(ANCHOR_GENERATOR_REGISTRY),
    "MODEL.ANCHOR_GENERATOR.OFFSET": Accepted(
        "a number in [0, 1)", lambda value: is_number(value) and 0 <= value < 1
    ),
    "MODEL.ANCHOR_GENERATOR.SIZES": list_of(list_of(POSITIVE_NUMBER)),
    "MODEL.BACKBONE.NAME": name_in(BACKBONE_REGISTRY),
    "MODEL.DEVICE": DEVICE,
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.MBN.DOUBLE_FORWARD": BOOLEAN,
    "MODEL.META_ARCHITECTURE": name_in(META_ARCH_REGISTRY),
    "MODEL.NORM_BATCH_SIZE": NON_NEGATIVE_INTEGER,
    "MODEL.PANOPTIC_FPN.COMBINE.ENABLED": Accepted(
        "True, for Detectron2 does not use it", lambda value: value is True
    ),
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": NON_NEGATIVE_INTEGER,
    "MODEL.PIXEL_STD": list_of(POSITIVE_NUMBER),
    "MODEL.PROPOSAL_GENERATOR.NAME": name_in(PROPOSAL_GENERATOR_REGISTRY, "PrecomputedProposals"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": NON_NEGATIVE_NUMBER,
    "MODEL.RETINANET.PRIOR_PROB": Accepted(
        "a number in (0, 1)", lambda value: is_number(value) and 0 < value < 1
    ),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": list_of(_BOX_WEIGHTS),
    "MODEL.ROI_BOX_HEAD.NAME": name_in(ROI_BOX_HEAD_REGISTRY, ""),
    "MODEL.ROI_HEADS.NAME": name_in(ROI_HEADS_REGISTRY),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": list_of(POSITIVE_INTEGER),
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": NON_NEGATIVE_INTEGER,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": name_in(ROI_KEYPOINT_HEAD_REGISTRY),
    "MODEL.ROI_MASK_HEAD.NAME": name_in(ROI_MASK_HEAD_REGISTRY),
    "MODEL.RPN.BOUNDARY_THRESH": NUMBER,
    "MODEL.RPN.CONV_DIMS": list_of(either(POSITIVE_INTEGER, one_of(-1))),
    "MODEL.RPN.HEAD_NAME": name_in(RPN_HEAD_REGISTRY),
    "MODEL.WEIGHTS_IMPORT": one_of(*WEIGHTS_IMPORT),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": INTEGER,
    "MODEL.SEM_SEG_HEAD.NAME": name_in(SEM_SEG_HEADS_REGISTRY),
    "SOLVER.BASE_LR": POSITIVE_NUMBER,
    "SOLVER.CHECKPOINT_PERIOD": POSITIVE_INTEGER,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE_NUMBER,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": either(POSITIVE_NUMBER, one_of(math.inf)),
    "SOLVER.GAMMA": POSITIVE_NUMBER,
    "SOLVER.IMS_PER_BATCH": POSITIVE_INTEGER,
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.MAX_ITER": POSITIVE_INTEGER,
    "SOLVER.NUM_DECAYS": POSITIVE_INTEGER,
    "SOLVER.REFERENCE_WORLD_SIZE": NON_NEGATIVE_INTEGER,
    "SOLVER.STEPS": list_of(POSITIVE_INTEGER),
    "SOLVER.VIRTUAL_WORKERS": POSITIVE_INTEGER,
    "SOLVER.WARMUP_FACTOR": FRACTION,
    "SOLVER.WARMUP_ITERS": NON_NEGATIVE_INTEGER,
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    # None stands for SOLVER.WEIGHT_DECAY.
    "SOLVER.WEIGHT_DECAY_NORM": either(NON_NEGATIVE_NUMBER, one_of(None)),
    "SOLVER.WEIGHT_DECAY_BIAS": either(NON_NEGATIVE_NUMBER, one_of(None)),
    "SOLVER.*": NON_NEGATIVE_NUMBER,
    "TEST.AUG.MAX_SIZE": POSITIVE_INTEGER,
    "TEST.AUG.MIN_SIZES": list_of(POSITIVE_INTEGER, at_least=1),
    "TEST.DETECTIONS_PER_IMAGE": POSITIVE_INTEGER,
    "TEST.EVAL_PERIOD": NON_NEGATIVE_INTEGER,
    "TEST.EXPECTED_RESULTS": list_of(
        Accepted("[task, metric, value, tolerance]", _is_expected_result)
    ),
    "TEST.KEYPOINT_OKS_SIGMAS": list_of(POSITIVE_NUMBER),
    "TEST.PRECISE_BN.NUM_ITER": POSITIVE_INTEGER,
    # What several parts of a model have.
    "*.BATCH_SIZE_PER_IMAGE": POSITIVE_INTEGER,
    "*.BBOX_REG_LOSS_TYPE": _LOSS_TYPE,
    "*.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "*.COMMON_STRIDE": POSITIVE_INTEGER,
    "*.*CONV*_DIM": POSITIVE_INTEGER,
    "*.DEPTH": POSITIVE_INTEGER,
    "*.DEFORM_ON_PER_STAGE": list_of(BOOLEAN, 4),
    "*.FC_DIM": POSITIVE_INTEGER,
    "*.FED_LOSS_FREQ_WEIGHT_POWER": NON_NEGATIVE_NUMBER,
    "*.FOCAL_LOSS_*": NON_NEGATIVE_NUMBER,
    "*.FREEZE_AT": NON_NEGATIVE_INTEGER,
    "*.IN_FEATURES": list_of(NON_EMPTY_STRING),
    "*.IOUS": list_of(FRACTION),
    "*.IOU_LABELS": list_of(IOU_LABEL),
    "*.IOU_THRESHOLDS": list_of(FRACTION),
    "*.LOSS_WEIGHT": NON_NEGATIVE_NUMBER,
    "*.*_LOSS_WEIGHT": NON_NEGATIVE_NUMBER,
    "*.NUM_CONV": NON_NEGATIVE_INTEGER,
    "*.NUM_CONVS": NON_NEGATIVE_INTEGER,
    "*.NUM_FC": NON_NEGATIVE_INTEGER,
    "*.*NUM_*": POSITIVE_INTEGER,
    "*.OUT_FEATURES": list_of(NON_EMPTY_STRING),
    "*.POOLER_RESOLUTION": POSITIVE_INTEGER,
    "*.POOLER_SAMPLING_RATIO": NON_NEGATIVE_INTEGER,
    "*.POOLER_TYPE": one_of("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated"),
    "*.POSITIVE_FRACTION": FRACTION,
    "*.RES5_DILATION": POSITIVE_INTEGER,
    "*.SMOOTH_L1*_BETA": NON_NEGATIVE_NUMBER,
    "*THRESH*": FRACTION,
    "*.*TOPK_*": POSITIVE_INTEGER,
    "*.WIDTH_PER_GROUP": POSITIVE_INTEGER,
    "*OUT_CHANNELS": POSITIVE_INTEGER,
}  # fmt: skip
_BY_TYPE = {bool: BOOLEAN, int: INTEGER, float: NUMBER, str: STRING}


def accepted_by(key: str, default: Any) -> Accepted:
    """
    What a key accepts.

    Args:
        key: dotted.
        default: its value in the defaults.
    """
    if key in _ACCEPTED:
        return _ACCEPTED[key]
    if isinstance(default, bool):
        return BOOLEAN
    for pattern, accepted in _ACCEPTED.items():
        if fnmatch.fnmatchcase(key, pattern):
            return accepted
    if isinstance(default, (list, tuple)):
        return list_of(accepted_by(f"{key}.", default[0]))
    return _BY_TYPE[type(default)]


def leaves(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a config that are no groups, dotted, with their values."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_values(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: a key has a value that it does not accept, or is missing. The options of norms are
            left to :func:`mabn_d2.plugin.norm_options`, keys that somebody else has added to them.
    """
    defaults = get_cfg()
    add_mabn_config(defaults)
    _check_groups(cfg, defaults)
    values = dict(leaves(cfg))
    norms = tuple(f"MODEL.{name}." for name, _ in NORM_REGISTRY)
    for key, default in leaves(defaults):
        if key.startswith(norms) and key not in _ACCEPTED:
            continue
        accepted = accepted_by(key, default)
        if not accepted.test(values[key]):
            raise ValueError(f"{key} must be {accepted.words}, got {values[key]!r}")


def _check_groups(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> None:
    """Finds a group of keys that another value has replaced."""
    for key, default in defaults.items():
        if key not in cfg:
            raise ValueError(f"{prefix}{key} is missing: {prefix[:-1]} was replaced as a whole")
        if isinstance(default, CfgNode):
            if not isinstance(cfg[key], CfgNode):
                raise ValueError(f"{prefix}{key} must be a group of keys, got {cfg[key]!r}")
            _check_groups(cfg[key], default, f"{prefix}{key}.")
        elif isinstance(cfg[key], CfgNode):
            raise ValueError(f"{prefix}{key} must not be a group of keys")
