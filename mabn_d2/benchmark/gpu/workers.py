"""Stage `workers`: two workers on one GPU, over gloo."""

import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from ...layers import BRN2d, MABN2d
from ...plugin import load_config
from ...training import average_norm_statistics, norm_statistics
from ..training import RandomBatchTrainer
from .correct import FILE, KEYS, VALUES
from .stage import Case, Options, Stage

WORKERS = 2
STEPS = 3


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone().cpu() for tensor in norm_statistics(model)]


def averaging(folder: Path, options: Options) -> dict:
    """What the norms of two workers saw apart, and what they have after averaging."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), MABN2d(8), nn.Conv2d(8, 8, 3), BRN2d(8)).cuda()
    torch.manual_seed(1 + comm.get_rank())
    for _ in range(STEPS):
        model(torch.randn(2, 3, 8, 8).cuda()).square().mean().backward()
    before = statistics(model)
    average_norm_statistics(model)
    return {"before": before, "after": statistics(model)}


def check_averaging(results: list[dict]) -> None:
    one, two = results
    assert any(not torch.equal(a, b) for a, b in zip(one["before"], two["before"]))
    for after, other, *before in zip(one["after"], two["after"], one["before"], two["before"]):
        assert torch.equal(after, other)
        if after.is_floating_point():
            torch.testing.assert_close(after, (before[0] + before[1]) / 2)


def training(folder: Path, options: Options) -> dict:
    """A detector that two workers train: its weights, and its statistics before they are averaged."""
    trainer = _trainer(folder, options)
    trainer.train()
    model = trainer.model.module
    before = statistics(model)
    average_norm_statistics(model)
    if comm.is_main_process():
        trainer.iter = STEPS - 1  # the last one; it is a step further by now
        trainer.checkpointer.save("model_final", iteration=trainer.iter)
    comm.synchronize()
    return {"weights": _weights(model), "before": before, "after": statistics(model)}


def check_training(results: list[dict]) -> None:
    one, two = results
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"]))
    assert all(weight.isfinite().all() for weight in one["weights"])
    assert any(not torch.equal(a, b) for a, b in zip(one["before"], two["before"]))


def checkpoint(folder: Path, options: Options) -> dict:
    """The detector of :func:`training`, and the one that its checkpoint gives."""
    trained = training(folder, options)
    trainer = _trainer(folder, options)
    trainer.resume_or_load(resume=True)
    model = trainer.model.module
    return {
        "iteration": trainer.start_iter,
        "trained": trained["weights"] + trained["after"],
        "loaded": _weights(model) + statistics(model),
    }


def check_checkpoint(results: list[dict]) -> None:
    for result in results:
        assert result["iteration"] == STEPS
        for tensor in ("trained", "loaded"):
            assert all(torch.equal(a, b) for a, b in zip(result[tensor], results[0]["trained"]))


def _trainer(folder: Path, options: Options) -> RandomBatchTrainer:
    path = options.root / "configs/quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn_instant.yaml"
    cfg = load_config(str(path))
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2 * WORKERS, STEPS, ()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 128
    cfg.OUTPUT_DIR = str(folder)
    torch.manual_seed(comm.get_rank())  # of the images; DDP makes the weights the same
    return RandomBatchTrainer(cfg)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone().cpu() for parameter in model.parameters()]


CHECKS: dict[str, tuple[Callable, Callable]] = {
    "averaging of statistics": (averaging, check_averaging),
    "training step": (training, check_training),
    "checkpoint": (checkpoint, check_checkpoint),
}


def cases(options: Options) -> list[Case]:
    return [
        {"check": f"{WORKERS} workers: {name}", "norm": "MABN", "dtype": "float32", "triton": ""}
        for name in CHECKS
    ]


def measure(case: Case, options: Options) -> Iterator[dict]:
    work, check = CHECKS[case["check"].partition(": ")[2]]
    check(run_workers(work, options))
    yield {"ok": "yes"}


def run_workers(work: Callable[[Path, Options], dict], options: Options) -> list[dict]:
    """What each worker returned, by rank. They all use the first GPU."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        arguments = functools.partial(_work, work, folder, options)
        processes = [fork.Process(target=arguments, args=(rank,)) for rank in range(WORKERS)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
        statuses = [process.exitcode for process in processes]
        if any(statuses):
            raise RuntimeError(f"the workers ended with status {statuses}, see above")
        return [torch.load(folder / f"result{rank}.pt") for rank in range(WORKERS)]


def _work(work: Callable, folder: Path, options: Options, rank: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORKERS)
    # Each is the only worker of a machine: with two on one machine, the second takes a second GPU.
    comm.create_local_process_group(1)
    torch.save(work(folder, options), folder / f"result{rank}.pt")
    dist.barrier()
    os._exit(0)  # an ordinary exit may abort: gloo's threads still free tensors


STAGE = Stage("workers", FILE, KEYS, VALUES, cases, measure)
