"""What the trainer for LazyConfigs has in common with the one for yacs configs."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase

from mabn_d2.data.loader import TrainLoader
from mabn_d2.engine import LazyTrainer, load_lazy_config
from mabn_d2.engine.hooks import DoubleForward, PreciseStatistics, statistics_batches
from mabn_d2.layers import MABN2d
from mabn_d2.training import population_statistics
from mabn_d2.utils.random import random_state, set_random_state

from .helpers import version_0_1_0

CONFIG = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from tests.helpers.version_0_1_0 import detector_config, TinyDetector

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train
model = L(TinyDetector)(cfg=L(detector_config)(norm="MABN", output="unused"))

del dataloader.evaluator
dataloader.train.dataset.names = "tiny"
dataloader.train.mapper.augmentations[0].short_edge_length = [16]
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 0
optimizer.lr = 0.002
train.init_checkpoint = ""
train.max_iter = 8
train.eval_period = 4
train.checkpointer.period = 4
train.seed = 3
"""


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    version_0_1_0.register_images(tmp_path_factory.mktemp("tiny"))


def build(folder, *overrides):
    file = folder / "config.py"
    file.write_text(CONFIG)
    torch.manual_seed(0)  # of the initialization
    cfg = load_lazy_config(str(file), [f"train.output_dir={folder}", *overrides])
    return LazyTrainer(cfg)


class RandomStates(HookBase):
    """Those after the last step."""

    def after_step(self):
        self.last = random_state()


class StopAfter(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def state(trainer):
    return trainer.model.state_dict()


@pytest.mark.parametrize("precise", ["False", "True"])
def test_a_detector_on_detectron2s_loader_resumes_as_if_it_had_not_been_stopped(tmp_path, precise):
    options = [f"train.precise_bn.enabled={precise}", "train.precise_bn.num_iter=3"]
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
    whole = build(folders[0], *options)
    assert isinstance(whole.train_loader, TrainLoader)
    whole.train()
    stopped = build(folders[1], *options)
    stopped.register_hooks([StopAfter(5)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = build(folders[1], *options)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    resumed.train()
    for key, value in state(whole).items():
        assert torch.equal(value, state(resumed)[key]), key


def test_precise_statistics_are_the_populations_before_evaluation_and_checkpoint(tmp_path):
    trainer = build(tmp_path, "train.precise_bn.enabled=True", "train.precise_bn.num_iter=4")
    (hook,) = (hook for hook in trainer._hooks if isinstance(hook, PreciseStatistics))
    random_states = RandomStates()
    trainer._hooks.insert(trainer._hooks.index(hook), random_states)
    random_states.trainer = trainer
    reads = []
    get = DatasetCatalog.get
    DatasetCatalog.get = lambda name: reads.append(name) or get(name)
    try:
        trainer.train()
    finally:
        DatasetCatalog.get = get
    assert reads == []  # the annotations are those of the training loader
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    trainer.iter = trainer.max_iter - 1  # where the hook was called
    batches = iter(statistics_batches(hook.trainer))
    set_random_state(random_states.last)  # the model draws in training
    with population_statistics(trainer.model), torch.no_grad():
        for _ in range(4):
            trainer.model(next(batches))
    norms = [n for n, m in trainer.model.named_modules() if isinstance(m, MABN2d)]
    assert norms
    for name in norms:
        expected = state(trainer)[f"{name}.running_var"]
        assert torch.equal(saved[f"{name}.running_var"], expected)


@pytest.mark.parametrize(
    "norm, option, doubled",
    [("MBN", [], True), ("MBN", ["train.double_forward=False"], False), ("MABN", [], False)],
)
def test_double_forward_is_on_where_the_model_has_a_memory(tmp_path, norm, option, doubled):
    hooks = build(tmp_path, f"model.cfg.norm={norm}", *option)._hooks
    assert isinstance(hooks[0], DoubleForward) == doubled
    assert sum(isinstance(hook, DoubleForward) for hook in hooks) == doubled
