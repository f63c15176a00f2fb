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
from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset

from ..data.loader import MappedDataset, ResumableLoader
from ..utils.random import seed_from


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


def _as_detectron2_sample(pair: tuple[Image, int]) -> dict[str, Any]:
    """A pair (PIL image, label) as the dict that a model of Detectron2 takes."""
    image, label = pair
    bgr = np.asarray(image.convert("RGB"))[:, :, ::-1]
    return {"image": torch.from_numpy(bgr.transpose(2, 0, 1).copy()), "label": label}


class ClassificationTrainLoader(ResumableLoader):
    """
    Iterable of training batches; each is a list of samples, the images of one worker.

    A sample is a dict of "image", a uint8 tensor of shape (3, H, W) in the order BGR, and "label".
    All workers together go through one shuffled epoch after the other; the images of an iteration are
    consecutive there.
    """

    def __init__(self, dataset: Dataset, total_batch_size: int, num_workers: int = 0, **options):
        """
        Args:
            dataset: of pairs (PIL image, label); randomly transformed for augmentation.
            total_batch_size: images per iteration, over all workers.
            num_workers: number of processes that load data for one worker.
            options: of `torch.utils.data.DataLoader`.

        Raises:
            ValueError: the data set is empty, or the batch cannot be divided among the workers.
        """
        if not len(dataset):
            raise ValueError(f"There are no images to train with in {type(dataset).__name__}")
        samples = MappedDataset(dataset, _as_detectron2_sample)
        super().__init__(samples, total_batch_size, num_workers, **options)

    def _batches(self):
        rank, world_size = comm.get_rank(), comm.get_world_size()
        first = self.start_iter * self.batch_size
        own = itertools.islice(self._indices(first * world_size), rank, None, world_size)
        draws = enumerate(own, first)
        return iter(lambda: list(itertools.islice(draws, self.batch_size)), [])

    def _indices(self, start: int) -> Iterator[int]:
        num_samples = len(self.dataset)
        epoch, skip = divmod(start, num_samples)
        for epoch in itertools.count(epoch):
            generator = np.random.default_rng(seed_from(self.seed, epoch))
            yield from generator.permutation(num_samples)[skip:].tolist()
            skip = 0


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
        MappedDataset(dataset, _as_detectron2_sample),
        sampler=InferenceSampler(len(dataset)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
    )
