"""Training loaders: what a sample is depends on the seed, the rank and the iteration, and on nothing else."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MapDataset,
    build_detection_train_loader,
)
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Dataset, IterableDataset

from mabn_d2.classification.data import ClassificationTrainLoader
from mabn_d2.data.loader import (
    MappedDataset,
    TrainLoader,
    build_lazy_train_loader,
    build_train_loader,
)

from .helpers import ROOT

ENTRIES = [{"id": i, "width": 2 + i % 3, "height": 3} for i in range(20)]


def random_sample(entry):
    """Draws from every generator, as augmentations do."""
    return {**entry, "drawn": [float(np.random.rand()), float(torch.rand(()))]}


class RandomPairs(Dataset):
    """Pairs (PIL image, label) of one random pixel."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        from PIL import Image

        return Image.new("L", (1, 1), int(np.random.randint(256))), index


def detection(num_workers=0, **options):
    return TrainLoader(
        ENTRIES, mapper=random_sample, total_batch_size=4, num_workers=num_workers, **options
    )


def classification(num_workers=0, **options):
    return ClassificationTrainLoader(RandomPairs(), 4, num_workers, **options)


def take(loader, count, start_iter=0):
    loader.start_iter = start_iter
    return [batch for batch, _ in zip(loader, range(count))]


def be_worker(monkeypatch, rank, world_size=2):
    """In this process; the processes of a data loader that are not forked know nothing of it."""
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)


@pytest.mark.parametrize(
    "build, method",
    [
        *[(detection, "fork"), (classification, "fork")],
        *[(detection, "spawn"), (classification, "forkserver")],
    ],
)
def test_a_sample_is_the_same_whatever_process_maps_it(build, method, monkeypatch):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{sys.platform} does not have it")
    batches = {}
    for rank in (0, 1):
        be_worker(monkeypatch, rank)
        batches[rank] = str(take(build(), 4))
    assert batches[0] != batches[1]
    # Worker 0 is what a process that knows of no workers takes itself for.
    mapped_elsewhere = build(num_workers=1, multiprocessing_context=method)
    assert str(take(mapped_elsewhere, 4)) == batches[1]


@pytest.mark.parametrize("build", [detection, classification])
def test_two_workers_draw_other_augmentations_for_the_same_draw(build, monkeypatch):
    key = "drawn" if build is detection else "image"
    drawn = []
    for rank in (0, 1):
        be_worker(monkeypatch, rank)
        drawn += [str(sample[key]) for batch in take(build(), 4) for sample in batch]
    assert len(set(drawn)) > len(drawn) * 0.9


@pytest.mark.parametrize("build", [detection, classification])
def test_a_replica_draws_with_a_seed_of_its_own_and_does_not_read_the_data_again(build):
    loader = build(num_workers=1, prefetch_factor=3)
    loader.seed, loader.start_iter = 1, 6
    replica = loader.replica(seed=2)
    assert replica.dataset is loader.dataset
    assert (loader.seed, loader.start_iter, loader.num_workers) == (1, 6, 1)
    fresh = build()
    fresh.seed = 2
    assert str(take(replica, 3)) == str(take(fresh, 3))


def test_images_are_grouped_and_drawn_as_by_detectron2(monkeypatch):
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    theirs = build_detection_train_loader(ENTRIES, mapper=lambda d: d, total_batch_size=4)
    expected = [[d["id"] for d in batch] for batch, _ in zip(theirs, range(12))]
    assert [[d["id"] for d in batch] for batch in take(detection(), 12)] == expected
    assert all(
        len({d["width"] > d["height"] for d in batch}) == 1 for batch in take(detection(), 9)
    )


def test_a_sample_that_is_none_is_replaced_as_by_a_mapper_of_detectron2():
    loader = TrainLoader(
        ENTRIES, mapper=lambda d: d if d["id"] % 4 else None, total_batch_size=2
    )  # fmt: skip
    ids = [d["id"] for batch in take(loader, 20) for d in batch]
    assert len(ids) == 40 and all(i % 4 for i in ids)
    none = TrainLoader(ENTRIES, mapper=lambda d: None, total_batch_size=2)
    with pytest.raises(RuntimeError, match="None for 1000 samples in a row"):
        next(iter(none))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ENTRIES * 10**9)


def test_an_iterable_data_set_is_refused_in_one_line():
    with pytest.raises(ValueError, match="The training data is a Stream, an iterable") as error:
        TrainLoader(Stream(), mapper=random_sample, total_batch_size=2)
    assert "\n" not in str(error.value)


def test_a_data_set_that_reads_its_entries_itself_is_taken():
    dataset = MappedDataset(DatasetFromList(ENTRIES), lambda entry: {**entry, "read": True})
    loader = TrainLoader(dataset, mapper=random_sample, total_batch_size=2)
    assert all(sample["read"] for batch in take(loader, 3) for sample in batch)
    assert isinstance(MapDataset(dataset, random_sample)[0], dict)  # as Detectron2 does


@pytest.fixture
def registered():
    """A data set `counted`, and how often it was read."""
    reads = []
    entries = [
        {**entry, "annotations": [{"category_id": entry["id"] % 3, "iscrowd": 0}]}
        for entry in ENTRIES
    ]
    DatasetCatalog.register("counted", lambda: reads.append(1) or list(entries))
    yield reads
    DatasetCatalog.remove("counted")


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_annotations_are_read_once_and_held_serialized_alone(registered, sampler):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("counted",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.SEED = 3
    loader = build_train_loader(cfg, random_sample)
    first = take(loader, 2)
    assert loader.seed == 3 and str(take(loader, 1, start_iter=1)) == str(first[1:])
    take(loader.replica(seed=4), 2)
    assert len(registered) == 1
    assert isinstance(loader.dataset.dataset, DatasetFromList)
    held = [v for v in vars(loader).values() if isinstance(v, list)]
    assert held == [loader.is_landscape]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_annotations_take_no_more_memory_than_in_detectron2s_loader():
    # docs/practice.md has the figures for 20000 images.
    figures = {}
    for loader in ("mabn_d2", "detectron2"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.loader_memory", loader, "2000"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        _, held, _, peak = done.stdout.splitlines()[-1].split()
        figures[loader] = float(held), float(peak)
    (held, peak), (their_held, their_peak) = figures.values()
    assert held < their_held + 10 and peak < their_peak + 10, figures
    assert held < peak / 2, figures


def lazy_call(**options):
    call = model_zoo.get_config("common/data/coco.py").dataloader.train
    call.dataset = list(ENTRIES)
    call.mapper = random_sample
    call.total_batch_size, call.num_workers = 4, 0
    call.update(options)
    return call


@pytest.mark.parametrize(
    "sampler",
    [
        None,
        L(TrainingSampler)(size=20),
        L(RandomSubsetTrainingSampler)(size=20, subset_ratio=0.5),
    ],
)
def test_detectron2s_loader_in_a_lazy_config_becomes_resumable(sampler):
    loaders = [build_lazy_train_loader(lazy_call(sampler=sampler)) for _ in range(2)]
    for loader in loaders:
        assert isinstance(loader, TrainLoader)
        loader.seed = 7
    whole = take(loaders[0], 6)
    assert str(take(loaders[1], 3, start_iter=3)) == str(whole[3:])
    loaders[1].seed = 8
    assert str(take(loaders[1], 6)) != str(whole)


def test_any_other_loader_of_a_lazy_config_is_what_the_config_says():
    assert isinstance(build_lazy_train_loader(L(RandomPairs)()), RandomPairs)
