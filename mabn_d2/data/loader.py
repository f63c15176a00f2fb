"""Training data loaders that can start at any iteration and give the same batches there."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from detectron2.utils.serialize import PicklableWrapper
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..utils.random import seed_from, temporary_seed


class MappedDataset(Dataset):
    """A data set of `mapper(dataset[index])`. The mapper may be a lambda, whatever process calls it."""

    def __init__(self, dataset: Dataset, mapper: Callable[[Any], Any]):
        self.dataset = dataset
        self.mapper = PicklableWrapper(mapper)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.mapper(self.dataset[index])


class _SeededSamples(Dataset):
    """
    Samples of a data set, each with random numbers of its own, addressed by pairs (draw, index).

    What a sample looks like depends on the seed and on its place in the draws of all workers, and not on the
    process that loads it, on what that has loaded before, or on the number of workers. As with Detectron2's `MapDataset`, another sample takes
    the place of one that is None.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        # The process that loads a sample need not know them.
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, draw_and_index: tuple[int, int]):
        draw, index = draw_and_index
        place = self.rank + self.world_size * draw  # samplers deal the indices out in turn
        with temporary_seed(seed_from(self.seed, 0, place)):
            for _ in range(1000):
                sample = self.dataset[index]
                if sample is not None:
                    return sample
                index = np.random.randint(len(self.dataset))
        raise RuntimeError("The mapper returned None for 1000 samples in a row")


class ResumableLoader:
    """
    Base of the iterables of training batches, each a list of samples: the images of one worker.

    A subclass says by :meth:`_batches` what is drawn.

    Attributes:
        seed: what samples are drawn and how they are augmented depends on this alone.
        start_iter: the iteration whose batch comes first. Both take effect at the next `iter()`.
    """

    def __init__(
        self,
        dataset: Dataset,
        total_batch_size: int,
        num_workers: int = 0,
        collate_fn: Callable = trivial_batch_collator,
        **options,
    ):
        """
        Args:
            dataset: of samples, addressed by an index; randomly augmented.
            total_batch_size: images per iteration, over all workers.
            num_workers: number of processes that load data for one worker.
            collate_fn, options: of `torch.utils.data.DataLoader`.

        Raises:
            ValueError: the data set is iterable, or the batch cannot be divided among the workers.
        """
        world_size = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ValueError(
                "total_batch_size (SOLVER.IMS_PER_BATCH) must be a positive multiple of the number of "
                f"workers ({world_size}), got {total_batch_size}"
            )
        self.dataset = dataset
        self.batch_size = total_batch_size // world_size
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.options = options
        self.seed = 0
        self.start_iter = 0

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """This worker's batches of (draw, index) pairs from `start_iter` on, without end."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[Any]]:
        # Samplers draw their seed, and a data loader draws one for its processes. That must not shift
        # the random numbers of the iteration in which training happens to start.
        with temporary_seed(self.seed):
            return iter(
                DataLoader(
                    _SeededSamples(self.dataset, self.seed),
                    batch_sampler=self._batches(),
                    num_workers=self.num_workers,
                    collate_fn=self.collate_fn,
                    **self.options,
                )
            )

    def replica(self, seed: int) -> "ResumableLoader":
        """A loader of the same data, which is not read again, in this process and with a seed of its own."""
        replica = copy.copy(self)
        replica.seed, replica.start_iter = seed, 0
        replica.num_workers, replica.options = 0, {}
        return replica


class TrainLoader(ResumableLoader):
    """
    The counterpart of `detectron2.data.build_detection_train_loader`, exactly resumable.

    The annotations are held once, serialized.
    """

    def __init__(
        self,
        dataset: list[dict[str, Any]] | Dataset,
        *,
        mapper: Callable | None,
        total_batch_size: int,
        sampler: Callable[[int], Sampler] | None = None,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        collate_fn: Callable | None = None,
        **options,
    ):
        """
        Args:
            dataset, mapper, total_batch_size, aspect_ratio_grouping, num_workers, collate_fn: as of
                `build_detection_train_loader`.
            sampler: given a seed, with which the random number generators are seeded too, the sampler
                of this worker's indices; `TrainingSampler` by default.
            options: of `torch.utils.data.DataLoader`.

        Raises:
            ValueError: the data set is iterable, or the batch cannot be divided among the workers.
        """
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"The training data is a {type(dataset).__name__}, an iterable data set: a run can be "
                "resumed exactly only where images have an index (torch.utils.data.Dataset or a list)"
            )
        self.is_landscape = [False] * len(dataset)
        if aspect_ratio_grouping:
            entries = (dataset[index] for index in range(len(dataset)))
            self.is_landscape = [d.get("width", 0) > d.get("height", 0) for d in entries]
        if isinstance(dataset, list):
            dataset = DatasetFromList(dataset, copy=False)
        self.sampler = sampler or (lambda seed: TrainingSampler(len(dataset)))
        super().__init__(
            dataset if mapper is None else MappedDataset(dataset, mapper),
            total_batch_size,
            num_workers,
            collate_fn or trivial_batch_collator,
            **options,
        )

    def _batches(self):
        sampler = self.sampler(self.seed)
        return itertools.islice(self._grouped(sampler), self.start_iter, None)

    def _grouped(self, sampler: Sampler) -> Iterator[list[tuple[int, int]]]:
        """
        Portrait with portrait and landscape with landscape images, as Detectron2's
        `AspectRatioGroupedDataset` does, but before anything is loaded, so that skipping is cheap.
        """
        buckets: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for draw, index in enumerate(sampler):
            bucket = buckets[self.is_landscape[index]]
            bucket.append((draw, index))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


def build_train_loader(cfg: CfgNode, mapper: Callable | None = None) -> TrainLoader:
    """
    The counterpart of `detectron2.data.build_detection_train_loader` for yacs configs.

    Args:
        cfg: the keys of `DATASETS`, `DATALOADER`, `INPUT` and `SOLVER.IMS_PER_BATCH` mean what they
            mean to Detectron2.
        mapper: `DatasetMapper(cfg, True)` by default.
    """
    cfg = cfg.clone()
    cfg.defrost()

    def sampler(seed: int) -> Sampler:
        cfg.SEED = seed
        return _train_loader_from_config(cfg, mapper, dataset=annotations)["sampler"]

    arguments = _train_loader_from_config(cfg, mapper, sampler=sampler)
    mapper = arguments["mapper"]
    loader = TrainLoader(**arguments)
    annotations = loader.dataset.dataset  # type: ignore[attr-defined]
    loader.seed = max(cfg.SEED, 0)
    return loader


def build_lazy_train_loader(call: DictConfig):
    """
    What a LazyConfig calls for its training data; :class:`TrainLoader` in place of
    `detectron2.data.build_detection_train_loader`, with the same arguments.
    """
    target = call["_target_"]
    target = locate(target) if isinstance(target, str) else target
    if target is not build_detection_train_loader:
        return instantiate(call)
    arguments = {key: call[key] for key in call if key not in ("_target_", "sampler")}
    sampler = (lambda seed: instantiate(call.sampler)) if call.get("sampler") else None
    return TrainLoader(**{k: instantiate(v) for k, v in arguments.items()}, sampler=sampler)
