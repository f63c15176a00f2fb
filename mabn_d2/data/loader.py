"""A training data loader that can start at any iteration and gives the same batches there."""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.random import seed_from, temporary_seed

logger = logging.getLogger(__name__)


class _Batches(Sampler):
    """
    Batches of (draw, index) pairs, `draw` counting what the sampler yields.

    Groups portrait with portrait and landscape with landscape images as Detectron2's
    `AspectRatioGroupedDataset` does, but before anything is loaded, so that skipping is cheap.
    """

    def __init__(self, sampler, is_landscape: list[bool], batch_size: int, start_iter: int):
        self.sampler = sampler
        self.is_landscape = is_landscape
        self.batch_size = batch_size
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._from_first(), self.start_iter, None)

    def _from_first(self):
        buckets = {False: [], True: []}
        for draw, index in enumerate(self.sampler):
            bucket = buckets[self.is_landscape[index]]
            bucket.append((draw, index))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


class _SeededSamples(Dataset):
    """
    Dataset of mapped samples, each with random numbers of its own.

    What a sample looks like does not depend on the process that maps it nor on what it mapped
    before. As with Detectron2's `MapDataset`, a mapper that returns None gets another sample.
    """

    def __init__(self, dicts: list[dict[str, Any]], mapper: Callable, seed: int):
        self.dicts = DatasetFromList(dicts, copy=False)
        self.mapper = mapper
        self.seed = seed

    def __len__(self):
        return len(self.dicts)

    def __getitem__(self, draw_and_index: tuple[int, int]):
        draw, index = draw_and_index
        with temporary_seed(seed_from(self.seed, comm.get_rank(), draw)):
            for _ in range(1000):
                sample = self.mapper(self.dicts[index])
                if sample is not None:
                    return sample
                index = np.random.randint(len(self.dicts))
        raise RuntimeError("The mapper returned None for 1000 samples in a row")


class TrainLoader:
    """
    Iterable of training batches; each is a list of mapped samples, the images of one worker.

    Attributes:
        seed: what samples are drawn and how they are augmented depends on this alone.
        start_iter: the iteration whose batch comes first. Both take effect at the next `iter()`.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable | None = None):
        """
        Args:
            cfg: config; the keys of `DATASETS`, `DATALOADER`, `INPUT` and `SOLVER.IMS_PER_BATCH`
                mean what they mean to Detectron2.
            mapper: as for `build_detection_train_loader`.

        Raises:
            ValueError: `SOLVER.IMS_PER_BATCH` cannot be divided among the workers.
        """
        world_size = comm.get_world_size()
        total = cfg.SOLVER.IMS_PER_BATCH
        if total < 1 or total % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be a positive multiple of the number of workers "
                f"({world_size}), got {total}"
            )
        self.cfg = cfg
        self.batch_size = total // world_size
        self.seed = max(cfg.SEED, 0)
        self.start_iter = 0
        loaded = _train_loader_from_config(cfg, mapper)
        self.dicts, self.mapper = loaded["dataset"], loaded["mapper"]
        grouping = cfg.DATALOADER.ASPECT_RATIO_GROUPING
        self.is_landscape = [
            grouping and d.get("width", 0) > d.get("height", 0) for d in self.dicts
        ]

    def __iter__(self) -> Iterator[list[Any]]:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SEED = self.seed
        # Detectron2's samplers draw their seed, and a data loader draws one for its workers. That
        # must not shift the random numbers of the iteration in which training happens to start.
        with temporary_seed(self.seed):
            sampler = _train_loader_from_config(cfg, self.mapper, dataset=self.dicts)["sampler"]
            batches = _Batches(sampler, self.is_landscape, self.batch_size, self.start_iter)
            return iter(
                DataLoader(
                    _SeededSamples(self.dicts, self.mapper, self.seed),
                    batch_sampler=batches,
                    num_workers=cfg.DATALOADER.NUM_WORKERS,
                    collate_fn=trivial_batch_collator,
                )
            )


def build_train_loader(cfg: CfgNode, mapper: Callable | None = None) -> TrainLoader:
    """The counterpart of `detectron2.data.build_detection_train_loader`, exactly resumable."""
    return TrainLoader(cfg, mapper)
