"""What is checked of a config of yacs."""

import argparse

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.file_io import PathManager

from ...plugin.registry import check_norm_names, count_workers, norm_options
from ...plugin.scaling import check_batch, norm_names, scaling_notice
from ..resumable import check_trainer_state
from ..trainer import EVALUATORS
from .build import build, check_layers, quiet
from .datasets import Needs, check_coco_ground_truth, check_dataset, check_training_data
from .files import check_arguments, check_output_dir, check_start
from .operators import check_compiled_operators
from .values import check_values


def check(cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    """
    Finds before any worker starts, and before anything is written, what would end the run later.

    Costs the building of a model without memory and one reading of the training data, which a single
    worker then takes over; several workers read it again, each its own copy.

    Args:
        cfg: of the command line.
        args: of Detectron2's `default_argument_parser`.

    Returns:
        warnings, one line each.

    Raises:
        ValueError: the message is one line that names the key or the file.
    """
    check_arguments(args)
    check_values(cfg)
    check_compiled_operators(cfg)
    check_norm_names(cfg)
    norm_options(cfg)
    processes = args.num_gpus * args.num_machines
    num_workers = count_workers(cfg, processes)
    if not args.eval_only:
        _check_virtual_workers(cfg, processes)
    _check_together(cfg, num_workers, args.eval_only)
    check_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    state = check_start(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", cfg.OUTPUT_DIR, args.resume)
    splits = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    for split in splits:
        for name in cfg.DATASETS[split]:
            check_dataset(name, f"DATASETS.{split}")
        _check_proposals(cfg, split)
    warnings = _check_evaluation(cfg, args.eval_only)
    notice = None if args.eval_only else scaling_notice(cfg, args.opts, num_workers)
    if notice:
        warnings.append(notice)
    if not args.eval_only:
        cfg = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        check_trainer_state(state, cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, num_workers)
    _build_all(cfg, args.eval_only)
    with quiet():
        for name in () if args.eval_only else cfg.DATASETS.TRAIN:
            warnings += check_training_data(
                name, "DATASETS.TRAIN", _needs(cfg), hand_over=processes == 1
            )
    return warnings


def _check_together(cfg: CfgNode, num_workers: int, eval_only: bool) -> None:
    """What each key alone accepts, and another one does not."""
    solver, test, on_cpu = cfg.SOLVER, cfg.TEST, cfg.MODEL.DEVICE == "cpu"
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN names no data set")
        check_batch(cfg, num_workers)
        if solver.AMP.ENABLED and on_cpu:
            raise ValueError("SOLVER.AMP.ENABLED needs a GPU, MODEL.DEVICE is 'cpu'")
    elif not cfg.DATASETS.TEST:
        raise ValueError("--eval-only: DATASETS.TEST names no data set")
    if test.EXPECTED_RESULTS and not cfg.DATASETS.TEST:
        raise ValueError("TEST.EXPECTED_RESULTS are expected, but DATASETS.TEST names no data set")
    sigmas, keypoints = len(test.KEYPOINT_OKS_SIGMAS), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if cfg.MODEL.KEYPOINT_ON and sigmas not in (0, keypoints):
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS must have one number for each of the "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {keypoints}, got {sigmas}"
        )
    for key, value in (
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        ("MODEL.KEYPOINT_ON", False),
        ("MODEL.LOAD_PROPOSALS", False),
    ):
        found = cfg.MODEL[key.split(".")[1]]
        if test.AUG.ENABLED and found != value:
            raise ValueError(f"TEST.AUG.ENABLED needs {key} {value}, got {found}")
    mean, std = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    if mean != std or mean == 0:
        raise ValueError(
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must have one number for each channel of the image, "
            f"got {mean} and {std}"
        )
    for part in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = cfg.MODEL[part].IOU_THRESHOLDS, cfg.MODEL[part].IOU_LABELS
        if not thresholds or sorted(thresholds) != list(thresholds):
            raise ValueError(f"MODEL.{part}.IOU_THRESHOLDS must ascend, got {thresholds}")
        if len(labels) != len(thresholds) + 1:
            raise ValueError(
                f"MODEL.{part}.IOU_LABELS must have one more element than IOU_THRESHOLDS "
                f"{thresholds}, got {labels}"
            )
    crop = cfg.INPUT.CROP
    if crop.ENABLED and crop.TYPE.startswith("relative") and max(crop.SIZE) > 1:
        raise ValueError(f"INPUT.CROP.SIZE must be at most 1 with {crop.TYPE!r}, got {crop.SIZE}")


def _check_virtual_workers(cfg: CfgNode, processes: int) -> None:
    solver = cfg.SOLVER
    if solver.VIRTUAL_WORKERS == 1:
        return
    key = f"SOLVER.VIRTUAL_WORKERS {solver.VIRTUAL_WORKERS}"
    if processes > 1:
        raise ValueError(f"{key} are those of one process, got --num-gpus for {processes}")
    double_forward = "MBN" in norm_names(cfg) and cfg.MODEL.MBN.DOUBLE_FORWARD
    for other, found in (
        ("SOLVER.AMP.ENABLED", solver.AMP.ENABLED),
        ("TEST.PRECISE_BN.ENABLED", cfg.TEST.PRECISE_BN.ENABLED),
        ("STATISTICS.ENABLED", cfg.STATISTICS.ENABLED),
        ("MODEL.MBN.DOUBLE_FORWARD", double_forward),
    ):
        if found:
            raise ValueError(f"{key} needs {other} False")


def _check_proposals(cfg: CfgNode, split: str) -> None:
    key = f"DATASETS.PROPOSAL_FILES_{split}"
    names, files = cfg.DATASETS[split], cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
    if files and not cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(f"{key} is read with MODEL.LOAD_PROPOSALS True only")
    if cfg.MODEL.LOAD_PROPOSALS and len(files) != len(names):
        raise ValueError(f"{key} must name one file for each of {', '.join(names)}, got {files}")
    for file in files:
        if "://" not in file and not PathManager.isfile(file):
            raise ValueError(f"{key}: {file} does not exist")


def _check_evaluation(cfg: CfgNode, eval_only: bool) -> list[str]:
    """Finds what would end the first evaluation, which may be days after the start."""
    warnings = []
    for name in cfg.DATASETS.TEST:
        kind = getattr(MetadataCatalog.get(name), "evaluator_type", None)
        if kind in EVALUATORS:
            if kind in ("coco", "coco_panoptic_seg"):
                check_coco_ground_truth(name, "DATASETS.TEST")
            continue
        found = "no evaluator_type" if kind is None else f"evaluator_type {kind!r}"
        message = f"DATASETS.TEST: {name} has {found}, accepted are {', '.join(EVALUATORS)}"
        if eval_only:
            raise ValueError(message)
        warnings.append(f"{message}: it is not evaluated")
    return warnings


def _needs(cfg: CfgNode) -> Needs:
    """What Detectron2's own models take from annotations; nothing is known of others."""
    architecture, heads = cfg.MODEL.META_ARCHITECTURE, "MODEL.ROI_HEADS.NUM_CLASSES"
    classes_keys = {
        "GeneralizedRCNN": heads,
        "PanopticFPN": heads,
        "ProposalNetwork": None,
        "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    }
    semantic = architecture in ("PanopticFPN", "SemanticSegmentor")
    if architecture not in classes_keys:
        return Needs(semantic=semantic)
    key = classes_keys[architecture]
    has_heads = key == heads
    return Needs(
        num_classes=cfg.MODEL[key.split(".")[1]].NUM_CLASSES if key else None,
        num_classes_key=key or "",
        mask_format=cfg.INPUT.MASK_FORMAT if has_heads and cfg.MODEL.MASK_ON else None,
        mask_format_key="INPUT.MASK_FORMAT",
        num_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            if has_heads and cfg.MODEL.KEYPOINT_ON
            else None
        ),
        num_keypoints_key="MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
        semantic=semantic,
    )


def _build_all(cfg: CfgNode, eval_only: bool) -> None:
    def build_one(device: torch.device) -> torch.nn.Module:
        there = cfg.clone()
        there.defrost()
        there.MODEL.DEVICE = str(device)
        return build_model(there)

    model = build("The model of MODEL", build_one)
    if cfg.get("STATISTICS", {"ENABLED": False})["ENABLED"]:
        check_layers(model, cfg.STATISTICS.LAYERS, "STATISTICS.LAYERS")
    build("The mapper of INPUT", lambda _: DatasetMapper(cfg, is_train=not eval_only))
    if not eval_only:
        optimizer = build("The optimizer of SOLVER", lambda _: build_optimizer(cfg, model))
        build("The LR schedule of SOLVER", lambda _: build_lr_scheduler(cfg, optimizer))
