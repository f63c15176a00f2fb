"""Data sets of labelled images, and loaders for them that can start at any iteration."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torchvision
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.random import seed_from, temporary_seed


def default_root() -> str:
    """The folder of all data sets: $DETECTRON2_DATASETS or "datasets", as for Detectron2's own."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


class ImageNet(torchvision.datasets.ImageFolder):
    """
    Labelled images at ROOT/imagenet/SPLIT/CLASS/, each class a folder.

    Items are pairs (transformed PIL image, label); the labels count the sorted names of the folders.
    """

    def __init__(self, split: str, transform: Callable, root: str | None = None):
        """
        Args:
            split: "train" or "val".
            transform: of a PIL image.
            root: :func:`default_root` by default.

        Raises:
            FileNotFoundError: there is no such folder, or a class in it has no images.
        """
        self.check_files(split, root)
        super().__init__(self._folder(split, root), transform)

    @staticmethod
    def _folder(split: str, root: str | None) -> str:
        return os.path.join(root or default_root(), "imagenet", split)

    @classmethod
    def check_files(cls, split: str, root: str | None = None) -> None:
        """
        Raises:
            FileNotFoundError: the split is not where it should be.
        """
        folder = cls._folder(split, root)
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{folder} does not exist: it should hold one folder of images per class. The "
                "environment variable DETECTRON2_DATASETS names the folder of the data sets"
            )


class FashionMNIST(torchvision.datasets.FashionMNIST):
    """
    The 60000 ("train") and 10000 ("val") grey images of 28x28 pixels at ROOT/FashionMNIST/raw/.

    Items are pairs (transformed PIL image, label).
    """

    def __init__(self, split: str, transform: Callable, root: str | None = None):
        """
        Args:
            split: "train" or "val".
            transform: of a PIL image.
            root: :func:`default_root` by default.

        Raises:
            FileNotFoundError: a file is missing.
        """
        self.check_files(split, root)
        super().__init__(root or default_root(), train=split == "train", transform=transform)

    @classmethod
    def check_files(cls, split: str, root: str | None = None) -> None:
        """
        Raises:
            FileNotFoundError: a file of the data set is missing.
        """
        folder = os.path.join(root or default_root(), "FashionMNIST", "raw")
        for name, _ in cls.resources:
            file = os.path.join(folder, os.path.splitext(name)[0])
            if not os.path.isfile(file):
                raise FileNotFoundError(
                    f"{file} does not exist: `make datasets/fashion-mnist` puts Fashion-MNIST into "
                    "./datasets. The environment variable DETECTRON2_DATASETS names the folder of "
                    "the data sets"
                )


class _Detectron2Samples(Dataset):
    """
    Pairs (PIL image, label) as the dicts that a model of Detectron2 takes.

    With a seed, samples are addressed by pairs (draw, index), and what a sample looks like depends on
    seed, worker and draw alone, whichever process maps it and whatever it has mapped before.
    """

    def __init__(self, pairs: Dataset, seed: int | None = None):
        self.pairs = pairs
        self.seed = seed
        self.rank = comm.get_rank()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, place) -> dict[str, Any]:
        if self.seed is None:
            return self._sample(place)
        draw, index = place
        with temporary_seed(seed_from(self.seed, self.rank, draw)):
            return self._sample(index)

    def _sample(self, index: int) -> dict[str, Any]:
        image, label = self.pairs[index]
        bgr = np.asarray(image.convert("RGB"))[:, :, ::-1]
        return {"image": torch.from_numpy(bgr.transpose(2, 0, 1).copy()), "label": label}


class _ShuffledBatches(Sampler):
    """
    This worker's batches of (draw, index) pairs from `start_iter` on, without end.

    All workers together go through one shuffled epoch after the other; the images of an iteration
    are consecutive there.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, start_iter: int):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start_iter * self.batch_size
        share = self._indices(first * comm.get_world_size())
        own = itertools.islice(share, comm.get_rank(), None, comm.get_world_size())
        draws = enumerate(own, first)
        while True:
            yield list(itertools.islice(draws, self.batch_size))

    def _indices(self, start: int) -> Iterator[int]:
        epoch, skip = divmod(start, self.num_samples)
        for epoch in itertools.count(epoch):
            generator = np.random.default_rng(seed_from(self.seed, epoch))
            yield from generator.permutation(self.num_samples)[skip:].tolist()
            skip = 0


class ClassificationTrainLoader:
    """
    Iterable of training batches; each is a list of samples, the images of one worker.

    A sample is a dict of "image", a uint8 tensor of shape (3, H, W) in the order BGR, and "label".

    Attributes:
        seed: what samples are drawn and how they are augmented depends on this alone.
        start_iter: the iteration whose batch comes first. Both take effect at the next `iter()`.
    """

    def __init__(self, dataset: Dataset, total_batch_size: int, num_workers: int = 0):
        """
        Args:
            dataset: of pairs (PIL image, label); randomly transformed for augmentation.
            total_batch_size: images per iteration, over all workers.
            num_workers: number of processes that load data for one worker.

        Raises:
            ValueError: the data set is empty, or the batch cannot be divided among the workers.
        """
        world_size = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ValueError(
                "total_batch_size must be a positive multiple of the number of workers "
                f"({world_size}), got {total_batch_size}"
            )
        if not len(dataset):
            raise ValueError(f"There are no images to train with in {type(dataset).__name__}")
        self.dataset = dataset
        self.batch_size = total_batch_size // world_size
        self.num_workers = num_workers
        self.seed = 0
        self.start_iter = 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # A data loader draws a seed for its processes. That must not shift the random numbers of the
        # iteration in which training happens to start.
        with temporary_seed(self.seed):
            return iter(
                DataLoader(
                    _Detectron2Samples(self.dataset, self.seed),
                    batch_sampler=_ShuffledBatches(
                        len(self.dataset), self.batch_size, self.seed, self.start_iter
                    ),
                    num_workers=self.num_workers,
                    collate_fn=trivial_batch_collator,
                )
            )


def build_classification_test_loader(
    dataset: Dataset, batch_size: int, num_workers: int = 0
) -> DataLoader:
    """
    A loader of every image once, divided among the workers.

    Args:
        dataset: of pairs (PIL image, label).
        batch_size: images of one worker that are evaluated at a time.
        num_workers: number of processes that load data for one worker.

    Raises:
        ValueError: the data set is empty.
    """
    if not len(dataset):
        raise ValueError(f"There are no images to evaluate in {type(dataset).__name__}")
    return DataLoader(
        _Detectron2Samples(dataset),
        sampler=InferenceSampler(len(dataset)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
    )
