"""One recipe for any number of workers: what is scaled, what stays, and what is said of it."""

import logging
from functools import partial

import pytest
from detectron2.config import LazyConfig
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from omegaconf import OmegaConf

from mabn_d2.engine import Trainer
from mabn_d2.engine.resumable import check_trainer_state
from mabn_d2.layers import MABN2d
from mabn_d2.plugin import check_batch, load_config, norm_options, scaling_notice
from mabn_d2.plugin.scaling import check_lazy_batch, lazy_scaling_notice, scale_lazy_config

from .helpers import CONFIGS

YAML_FILES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("Base-") and path.parent.name != "study"  # plans
)
QUICK = "quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn.yaml"
MASK_RCNN = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_2x_mabn.yaml"
COUNTED = {
    "MABN": ("WARMUP_ITERS", "RENORM_START_ITER"),
    "BRN": ("R_MAX_ITERS", "D_MAX_ITERS"),
}


def load(name, *overrides):
    return load_config(str(CONFIGS / name), overrides)


def scale(cfg, num_workers):
    return Trainer.auto_scale_workers(cfg, num_workers)


def times(iterations, factor):
    if isinstance(iterations, tuple):
        return tuple(times(value, factor) for value in iterations)
    return round(iterations * factor)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", YAML_FILES)
def test_every_config_trains_its_recipe_with_any_number_of_workers(name, num_workers):
    cfg = load(name)
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference == 0:  # two images are taken literally
        assert name.startswith("quick_schedules")
        if num_workers <= 2:
            assert scale(cfg, num_workers) == cfg
        else:
            with pytest.raises(ValueError, match=rf"workers \({num_workers}\), got 2"):
                scale(cfg, num_workers)
        return
    scaled, factor = scale(cfg, num_workers), reference / num_workers
    solver, before = scaled.SOLVER, cfg.SOLVER
    assert solver.IMS_PER_BATCH == 2 * num_workers
    assert solver.BASE_LR == pytest.approx(before.BASE_LR / factor)
    for key in ("MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        assert solver[key] == times(before[key], factor)
    assert max(solver.STEPS) < solver.MAX_ITER
    assert scaled.TEST.EVAL_PERIOD == times(cfg.TEST.EVAL_PERIOD, factor)
    for norm, keys in COUNTED.items():
        for key in keys:
            assert scaled.MODEL[norm][key] == times(cfg.MODEL[norm][key], factor)
    # The moving averages span the paper's 32 images however many workers there are.
    assert norm_options(scaled)["MABN"]["buffer_size"] == 16
    # A scaled config is one for so many workers, and nothing else has changed.
    assert solver.REFERENCE_WORLD_SIZE == num_workers
    assert scale(scaled, num_workers) == scaled
    scaled.SOLVER = cfg.SOLVER
    scaled.TEST.EVAL_PERIOD = cfg.TEST.EVAL_PERIOD
    for norm, keys in COUNTED.items():
        for key in keys:
            scaled.MODEL[norm][key] = cfg.MODEL[norm][key]
    assert scaled == cfg


# One GPU, 2 images a step: the learning rate divided by 8, and 8 times the iterations of everything.
ONE_GPU = {
    name: {
        "IMS_PER_BATCH": 2,
        "BASE_LR": base_lr,
        "STEPS": (960000, 1280000),
        "MAX_ITER": 1440000,
        "WARMUP_ITERS": 4000,
        "CHECKPOINT_PERIOD": 40000,
    }
    for name, base_lr in {
        "COCO-Detection/faster_rcnn_R_50_FPN_2x_mabn.yaml": 0.0025,
        "COCO-Detection/retinanet_R_50_FPN_2x_mabn.yaml": 0.00125,
        "COCO-Detection/scratch_faster_rcnn_R_50_FPN_2x_mabn.yaml": 0.0025,
        "COCO-Detection/scratch_retinanet_R_50_FPN_2x_mabn.yaml": 0.00125,
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_mabn.yaml": 0.0025,
        MASK_RCNN: 0.0025,
    }.items()
}


@pytest.mark.parametrize("name", ONE_GPU)
def test_with_one_worker_a_recipe_is_that_of_version_0_1_for_one_gpu(name):
    solver = scale(load(name), 1).SOLVER
    assert {key: solver[key] for key in ONE_GPU[name]} == ONE_GPU[name]
    others = {key: value for key, value in solver.items() if key not in ONE_GPU[name]}
    expected = {k: v for k, v in load(name).SOLVER.items() if k not in ONE_GPU[name]}
    assert others == {**expected, "REFERENCE_WORLD_SIZE": 1}


def test_the_trainers_of_detectron2_scale_the_norms_too_and_say_so(caplog):
    cfg = load(MASK_RCNN)
    cfg.freeze()
    with caplog.at_level(logging.INFO):
        scaled = DefaultTrainer.auto_scale_workers(cfg, 1)
    assert scaled.is_frozen() and scaled.MODEL.MABN.WARMUP_ITERS == 800
    (line,) = [text for text in caplog.messages if text.startswith("Scaled to 1 worker")]
    assert "MODEL.MABN.WARMUP_ITERS 100 -> 800" in line and "BRN" not in line


def test_periods_do_not_become_never():
    cfg = load(MASK_RCNN, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 3,
               "SOLVER.REFERENCE_WORLD_SIZE", 1)  # fmt: skip
    scaled = scale(cfg, 8)
    assert scaled.SOLVER.CHECKPOINT_PERIOD == scaled.TEST.EVAL_PERIOD == 1


# ---- the number of images that a moving average spans --------------------------------------------


@pytest.mark.parametrize(
    "batch, reference, norm_batch, expected",
    [(16, 8, 0, 16), (8, 8, 0, 32), (32, 8, 0, 8), (2, 0, 0, 16), (3, 0, 0, 11), (64, 0, 0, 1),
     (16, 0, 2, 16), (16, 0, 1, 32), (2, 0, 4, 16)],
)  # fmt: skip
def test_buffer_size_0_spans_32_images_of_a_worker_or_of_a_normalization_batch(
    batch, reference, norm_batch, expected
):
    cfg = load(QUICK, "SOLVER.IMS_PER_BATCH", batch, "SOLVER.REFERENCE_WORLD_SIZE", reference,
               "MODEL.NORM_BATCH_SIZE", norm_batch)  # fmt: skip
    assert cfg.MODEL.MABN.BUFFER_SIZE == 0
    assert norm_options(cfg)["MABN"]["buffer_size"] == expected


# ---- the warm-up that lasts to the first decay of the learning rate -------------------------------


@pytest.mark.parametrize("workers, expected", [(8, 400), (2, 1600), (16, 200)])
def test_a_warm_up_of_minus_1_lasts_to_the_first_step_of_the_scaled_schedule(workers, expected):
    cfg = load(QUICK, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8,
               "SOLVER.STEPS", (400, 500), "MODEL.MABN.WARMUP_ITERS", -1)  # fmt: skip
    scaled = scale(cfg, workers)
    assert scaled.MODEL.MABN.WARMUP_ITERS == -1
    assert norm_options(scaled)["MABN"]["warmup_iters"] == expected == scaled.SOLVER.STEPS[0]
    options = norm_options(load(QUICK, "SOLVER.STEPS", (400, 500)))
    assert options["MABN"]["warmup_iters"] == load(QUICK).MODEL.MABN.WARMUP_ITERS > 0


def test_a_model_has_the_warm_up_of_its_schedule():
    cfg = load(QUICK, "SOLVER.STEPS", (400, 500), "MODEL.MABN.WARMUP_ITERS", -1,
               "MODEL.RESNETS.NORM", "MABN")  # fmt: skip
    norms = [m for m in build_model(cfg).modules() if isinstance(m, MABN2d)]
    assert norms and {norm.warmup_iters for norm in norms} == {400}


@pytest.mark.parametrize(
    "options", [["SOLVER.STEPS", ()], ["SOLVER.STEPS", (9000,)], ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]]
)  # fmt: skip
def test_without_a_decay_before_the_end_there_is_no_such_warm_up(options):
    with pytest.raises(ValueError, match="MODEL.MABN.WARMUP_ITERS -1 stands for the first of SOLV"):
        load(QUICK, "MODEL.MABN.WARMUP_ITERS", -1, "SOLVER.MAX_ITER", 8000, *options)


def test_the_layer_itself_takes_a_positive_size_alone():
    with pytest.raises(ValueError, match="buffer_size must be a positive integer, got 0"):
        MABN2d(4, buffer_size=0)
    assert MABN2d(4).psi.size == 16


# ---- what cannot be divided, and what is said before the start -----------------------------------


@pytest.mark.parametrize(
    "batch, reference, num_workers, message",
    [
        (4, 8, 1, r"SOLVER.IMS_PER_BATCH must be a positive multiple of SOLVER.REFERENCE_WORLD_SIZE "
                  r"\(8\), got 4; where SOLVER.REFERENCE_WORLD_SIZE is 0, the batch is taken literally"),
        (0, 8, 8, r"positive multiple of SOLVER.REFERENCE_WORLD_SIZE \(8\), got 0"),
        (16, 0, 3, r"SOLVER.IMS_PER_BATCH must be a positive multiple of the number of workers \(3\), "
                   "got 16"),
        (16, -1, 1, r"SOLVER.REFERENCE_WORLD_SIZE must be a non-negative integer, got -1"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_divided_is_refused(batch, reference, num_workers, message):
    cfg = load(QUICK, "SOLVER.IMS_PER_BATCH", batch, "SOLVER.REFERENCE_WORLD_SIZE", reference)
    for use in (check_batch, scale):
        with pytest.raises(ValueError, match=message):
            use(cfg, num_workers)


def test_what_becomes_of_what_the_command_line_gives_is_said_in_one_line():
    given = ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.01", "SEED", "1"]
    assert scaling_notice(load(MASK_RCNN, *given), given, 2) == (
        "SOLVER.REFERENCE_WORLD_SIZE is 8, the run has 2 workers: SOLVER.IMS_PER_BATCH 8 becomes 2, "
        "SOLVER.BASE_LR 0.01 becomes 0.0025. SOLVER.REFERENCE_WORLD_SIZE 0 takes them literally."
    )
    given = ["SOLVER.MAX_ITER", "100"]
    assert "MAX_ITER 100 becomes 800" in scaling_notice(load(MASK_RCNN, *given), given, 1)


@pytest.mark.parametrize(
    "given, num_workers",
    [(["SEED", "1"], 1), (["SOLVER.MAX_ITER", "100"], 8),
     (["SOLVER.MAX_ITER", "100", "SOLVER.REFERENCE_WORLD_SIZE", "0"], 1)],
)  # fmt: skip
def test_what_is_taken_literally_needs_no_word(given, num_workers):
    assert scaling_notice(load(MASK_RCNN, *given), given, num_workers) is None


@pytest.mark.parametrize("before, now, message", [
    (8, 1, "trained by 8 workers, it cannot go on with 1"), (1, 2, "trained by 1 worker, .* with 2"),
])  # fmt: skip
def test_a_run_does_not_go_on_with_another_number_of_workers(before, now, message):
    check_trainer_state({"num_workers": before}, "output", 9, before)
    with pytest.raises(ValueError, match=message):
        check_trainer_state({"num_workers": before}, "output", 9, now)


# ---- lazy configs --------------------------------------------------------------------------------


def load_lazy(name, **train):
    cfg = LazyConfig.load(str(CONFIGS / name))
    cfg.train.update(train)
    return cfg


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 8])
def test_a_lazy_config_is_scaled_as_its_yaml_twin(num_workers, caplog):
    lazy, cfg = load_lazy(MASK_RCNN.replace(".yaml", ".py")), scale(load(MASK_RCNN), num_workers)
    original = OmegaConf.to_container(lazy)
    with caplog.at_level(logging.INFO):
        scaled = scale_lazy_config(lazy, num_workers)
    assert OmegaConf.to_container(lazy) == original
    assert scaled.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert scaled.optimizer.lr == pytest.approx(cfg.SOLVER.BASE_LR)
    assert scaled.optimizer.params.base_lr == scaled.optimizer.lr
    assert scaled.train.max_iter == cfg.SOLVER.MAX_ITER
    assert scaled.train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    warmup = scaled.lr_multiplier.warmup_length * scaled.train.max_iter
    assert warmup == pytest.approx(cfg.SOLVER.WARMUP_ITERS, abs=0.5)
    for node in (scaled.model.backbone.bottom_up.stem, scaled.model.roi_heads.box_head):
        norm = node.get("norm", node.get("conv_norm"))
        options = norm.keywords if isinstance(norm, partial) else {}
        built = MABN2d(4, **options)
        assert built.warmup_iters == cfg.MODEL.MABN.WARMUP_ITERS
        assert built.renorm_start_iter == cfg.MODEL.MABN.RENORM_START_ITER
    assert ("Scaled to" in caplog.text) == (num_workers != 8)


def test_the_arguments_that_a_lazy_config_gives_a_norm_are_kept_and_scaled():
    cfg = load_lazy("ImageNet/resnet50_mabn_2.py")
    scaled = scale_lazy_config(cfg, 1)
    before, after = cfg.model.stages.norm, scaled.model.stages.norm
    assert after.func is before.func is MABN2d
    counts = ("warmup_iters", "renorm_start_iter")
    assert {key: after.keywords[key] for key in counts} == {
        key: 8 * before.keywords[key] for key in counts
    }
    others = before.keywords.keys() - {*counts}
    assert others and all(after.keywords[key] == before.keywords[key] for key in others)
    assert scaled.model.stem.norm is after  # it refers to that of the stages


def test_what_becomes_of_the_overrides_of_a_lazy_config_is_said_in_one_line():
    cfg = load_lazy("ImageNet/resnet50_mabn_2.py", max_iter=100)
    given = ["train.max_iter=100", "optimizer.lr=0.1", "train.seed=1"]
    assert lazy_scaling_notice(cfg, given, 2) == (
        "train.reference_world_size is 8, the run has 2 workers: train.max_iter 100 becomes 400, "
        "optimizer.lr 0.1 becomes 0.025. train.reference_world_size 0 takes them literally."
    )
    assert lazy_scaling_notice(cfg, given, 8) is None
    assert lazy_scaling_notice(cfg, ["train.seed=1"], 2) is None


def test_a_lazy_batch_that_cannot_be_divided_is_refused():
    cfg = load_lazy("ImageNet/resnet50_mabn_2.py")
    cfg.dataloader.train.total_batch_size = 12
    with pytest.raises(ValueError, match=r"multiple of train.reference_world_size \(8\), got 12"):
        check_lazy_batch(cfg, 1)
    cfg.train.reference_world_size = 0
    with pytest.raises(
        ValueError, match=r"total_batch_size .* the number of workers \(5\), got 12"
    ):
        check_lazy_batch(cfg, 5)
