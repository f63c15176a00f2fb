"""Workers that take turns in one process, against workers in processes of their own."""

import copy

import pytest
import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mabn_d2 import BRN2d, MABN2d, MBN2d
from mabn_d2.data import make_synthetic_coco
from mabn_d2.engine import SyncNormStatistics
from mabn_d2.training import VirtualWorkers, average_norm_statistics

from .helpers.runs import train_a_worker, weights
from .helpers.workers import run_workers

STEPS = 20


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    make_synthetic_coco(root, layout="shapes", train=20, val=4, size=64)
    return root


def make_model(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), norm(4)
    ).double()


def images_of(worker, step):
    generator = torch.Generator().manual_seed(100 * step + worker)
    return torch.randn(2, 3, 8, 8, dtype=torch.double, generator=generator)


def loss_of(y):
    return (y - y.detach().roll(1, -1)).pow(2).mean() + y.sin().mean()


def train_process(norm):
    model = DistributedDataParallel(make_model(norm), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(images_of(comm.get_rank(), step))).backward()
        optimizer.step()
    own = copy.deepcopy(model.module.state_dict())
    average_norm_statistics(model.module)
    return own, model.module.state_dict()


def train_in_turns(norm, count):
    model = make_model(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    workers = VirtualWorkers(model, count)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(count):
            with workers.turn(index):
                loss_of(model(images_of(index, step))).backward()
        workers.average_gradients()
        optimizer.step()
    own = []
    for index in range(count):
        with workers.turn(index):
            own.append(copy.deepcopy(model.state_dict()))
    workers.average()
    return own, model.state_dict()


NORMS = [MABN2d, BRN2d, MBN2d, nn.BatchNorm2d]


def train_processes():
    return [train_process(norm) for norm in NORMS]


@pytest.mark.slow
def test_eight_virtual_workers_are_eight_processes(tmp_path):
    processes = run_workers(8, train_processes, tmp_path)
    for norm, by_rank in zip(NORMS, zip(*processes)):
        own, averaged = train_in_turns(norm, 8)
        for rank, (of_process, averaged_of_process) in enumerate(by_rank):
            torch.testing.assert_close(own[rank], of_process, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(averaged, averaged_of_process, rtol=1e-9, atol=1e-12)
        assert any(not torch.equal(own[0][key], own[1][key]) for key in averaged)


def test_every_worker_holds_the_mean_after_averaging_and_the_models_statistics_after_a_start():
    model = make_model(MABN2d)
    workers = VirtualWorkers(model, 3)
    for index in range(3):
        with workers.turn(index):
            model(images_of(index, 0))
    workers.average()
    states = []
    for index in range(3):
        with workers.turn(index):
            states.append(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(states[0], states[2], rtol=0, atol=0)
    model.load_state_dict(make_model(MABN2d).state_dict())
    workers.start()
    with workers.turn(2):
        torch.testing.assert_close(model.state_dict(), make_model(MABN2d).state_dict())


def test_an_error_in_a_turn_leaves_the_first_workers_statistics_in_the_model():
    model = make_model(nn.BatchNorm2d)
    workers = VirtualWorkers(model, 2)
    own = model[1].running_mean
    with pytest.raises(RuntimeError), workers.turn(1):
        assert model[1].running_mean is not own
        raise RuntimeError
    assert model[1].running_mean is own


def test_the_hook_that_averages_serves_a_trainer_without_virtual_workers():
    class OwnTrainer(TrainerBase):
        model, iter, max_iter = make_model(MABN2d), 3, 4

    hook = SyncNormStatistics(2)
    hook.trainer = OwnTrainer()
    hook.after_step()


def train(datasets, output, iterations, *options):
    torch.manual_seed(0)
    return train_a_worker(datasets, output, iterations, "SEED", "1", *options)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["MABN", "BN"])
def test_a_detector_trains_as_in_two_processes_to_the_bit(shapes, tmp_path, norm):
    keys = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    options = [text for key in keys for text in (f"MODEL.{key}.NORM", norm)]
    arguments = ["MODEL.MABN.RENORM_START_ITER", "5", "MODEL.MABN.WARMUP_ITERS", "2", *options]
    processes = run_workers(2, train, tmp_path, shapes, tmp_path / "processes", 12, *arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(shapes, tmp_path / "turns", 12, "SOLVER.VIRTUAL_WORKERS", "2", *arguments)
    finally:
        torch.set_num_threads(threads)
    expected, got = weights(tmp_path / "processes"), weights(tmp_path / "turns")
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key
    own = processes[0][0], processes[1][0]
    assert sum(not torch.equal(a, b) for a, b in zip(*own)) > 50
