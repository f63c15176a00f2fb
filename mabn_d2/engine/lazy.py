"""The trainer for LazyConfigs."""

import difflib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase, TrainerBase, default_writers
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data.loader import build_lazy_train_loader
from ..plugin.scaling import scale_lazy_config
from ..surgery import fold
from .hooks import build_hooks
from .preflight import items
from .resumable import ResumableTrainer

_PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
# What the trainer takes beyond the `train` of Detectron2's configs/common/train.py.
_DEFAULTS = {
    "weights_import": "exact",  # or "adapt" or "as_is", see mabn_d2.checkpoint.Checkpointer
    "seed": -1,  # of all random choices; a negative one stands for a random seed
    "double_forward": True,  # whether MBN, where it is in the model, renews its memory after each step
    # Whether the running statistics are recomputed before evaluation, and over how many batches.
    "precise_bn": {"enabled": False, "num_iter": 200},
    # Whether the ℓ2 norms of batch statistics are recorded: of which norms, every how many iterations.
    "statistics": {"enabled": False, "layers": ["*"], "period": 20},
    "reference_world_size": 0,  # as SOLVER.REFERENCE_WORLD_SIZE, see plugin/scaling.py
}


def load_lazy_config(file: str, overrides: list[str]) -> DictConfig:
    """
    A LazyConfig with the overrides of a command line.

    Args:
        file: Python or YAML.
        overrides: strings `key=value` for keys that the config has, and `+key=value` for others, such as
            an optional argument that the config does not give.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the config lacks a part, or an override is wrong.
    """
    if not PathManager.isfile(file):
        raise FileNotFoundError(f"--config-file: {file!r} is not a file")
    cfg = LazyConfig.load(file)
    missing = [part for part in _PARTS if part not in cfg]
    if missing:
        raise ValueError(f"{file} does not define {', '.join(missing)}")
    _add_defaults(cfg.train)
    keys = [key for key, _ in items(OmegaConf.to_container(cfg))]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ValueError(f"{override}: an override has the form key=value")
        if key not in keys and not key.startswith("+"):
            similar = difflib.get_close_matches(key, keys, 1)
            hint = f" Similar is {similar[0]}." if similar else ""
            raise ValueError(f"{file} has no key {key}.{hint} A new key is given as +{override}")
        try:
            LazyConfig.apply_overrides(cfg, [override])
        except Exception as e:  # of Hydra's parser and of OmegaConf, of many types
            raise ValueError(f"{override}: {str(e).splitlines()[0]}") from e
    for part in _PARTS:
        if not isinstance(cfg[part], DictConfig):
            raise ValueError(f"{part} must be a group of keys, got {cfg[part]!r}")
    if not torch.cuda.is_available():
        cfg.train.device = "cpu"
    return cfg


def _add_defaults(options: DictConfig, defaults: dict[str, Any] = _DEFAULTS) -> None:
    for key, value in defaults.items():
        options.setdefault(key, value)
        if isinstance(value, dict):
            _add_defaults(options[key], value)


class LazyTrainer(ResumableTrainer):
    """
    The counterpart of :class:`mabn_d2.engine.Trainer` for LazyConfigs.

    Takes configs with the parts that Detectron2's `tools/lazyconfig_train_net.py` takes:

        model: instantiates to a module that returns a dict of losses in training
        dataloader.train, dataloader.test: to iterables of batches
        dataloader.evaluator: to a `DatasetEvaluator`; without one there is no evaluation
        optimizer: to an optimizer; the model becomes an argument of its `params`
        lr_multiplier: to a fvcore `ParamScheduler`
        train: output_dir, init_checkpoint, max_iter, amp.enabled, ddp, checkpointer, eval_period,
            log_period, device as in Detectron2's configs/common/train.py, and what
            :func:`load_lazy_config` adds: weights_import, seed, double_forward, precise_bn

    Data loaders of this package and Detectron2's for detection resume where they were; any other
    starts anew.
    """

    def __init__(self, cfg: DictConfig):
        """
        Args:
            cfg: of :func:`load_lazy_config`.
        """
        _add_defaults(cfg.train)
        self.cfg = cfg = scale_lazy_config(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        params = {**cfg.optimizer.params, "model": model}
        optimizer = instantiate({**cfg.optimizer, "params": params})
        super().__init__(
            model,
            optimizer,
            self.build_train_loader(cfg),
            seed=cfg.train.seed,
            max_iter=cfg.train.max_iter,
            output_dir=cfg.train.output_dir,
            weights=cfg.train.init_checkpoint,
            weights_import=cfg.train.weights_import,
            amp=cfg.train.amp.enabled,
            **cfg.train.ddp,
        )
        self.scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), self.max_iter)
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        """The model on the device of `train.device`."""
        model = instantiate(cfg.model).to(cfg.train.device)
        logging.getLogger(__name__).info("Model:\n%s", model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: DictConfig) -> Iterable:
        """Detectron2's detection loader is made resumable; any other is what the config says."""
        return build_lazy_train_loader(cfg.dataloader.train)

    def build_writers(self):
        return default_writers(self.cfg.train.output_dir, self.max_iter)

    def build_hooks(self) -> list[HookBase]:
        """Those of :func:`mabn_d2.engine.hooks.build_hooks`."""
        options = self.cfg.train
        precise, recorded = options.precise_bn, options.statistics
        has_evaluator = "evaluator" in self.cfg.dataloader
        return build_hooks(
            self,
            double_forward=options.double_forward,
            precise_iters=precise.num_iter if precise.enabled else 0,
            eval_period=options.eval_period,
            evaluate=(lambda: self.test(self.cfg, self.model)) if has_evaluator else None,
            checkpoints=options.checkpointer,
            log_period=options.log_period,
            statistics=(list(recorded.layers), recorded.period) if recorded.enabled else None,
        )

    def train(self) -> None:
        """Trains from `start_iter` to `max_iter`."""
        # DefaultTrainer's own looks for expected results in a yacs config.
        TrainerBase.train(self, self.start_iter, self.max_iter)

    @classmethod
    def test(cls, cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
        """
        Evaluates a model on `dataloader.test` and prints the results.

        What runs is a copy in which norms are part of their convolutions, see `fold`.

        Returns:
            what the evaluator returns; {} on all workers but the first.
        """
        loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        results = inference_on_dataset(fold(model), loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results)
        return results
