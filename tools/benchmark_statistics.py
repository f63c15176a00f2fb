#!/usr/bin/env python
"""
Times what recording batch statistics adds to a training step.

    tools/benchmark_statistics.py --config-file FILE [KEY VALUE ...]

Three kinds of steps take turns in one process, on the same batch: without a recorder, one that is
recorded, and one between two that are recorded. On the CPU it is processor time, which other work on
the machine changes little; on a GPU, time on the wall. A ratio is the median over rounds of the ratio within a
round; that of PERIOD 20 reckons one recorded step and 19 others.
"""

import argparse
import os
import statistics
import sys
import time

import torch
from detectron2.utils.events import EventStorage

from mabn_d2.engine import Trainer
from mabn_d2.plugin import load_config
from mabn_d2.plugin.command_line import add_arguments, bring_in
from mabn_d2.statistics import StatisticsRecorder
from mabn_d2.utils.command_line import errors_in_one_line, without_usage


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="(default: 20)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return without_usage(add_arguments(parser)).parse_args()


def time_step(model, batch, optimizer, recorder) -> float:
    """Seconds of one training step."""
    on_gpu = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    clock = time.perf_counter if on_gpu else time.process_time
    synchronize()
    start = clock()
    optimizer.zero_grad()
    sum(model(batch).values()).backward()
    optimizer.step()
    if recorder is not None:
        recorder.step()
        recorder.flush()
    synchronize()
    return clock() - start


def measure(cfg, rounds: int) -> tuple[int, list[list[float]]]:
    """The number of norms, and of each round the times of the three kinds of steps."""
    torch.manual_seed(max(cfg.SEED, 0))
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6  # weights that nobody trained must not diverge
    batch = next(iter(Trainer.build_train_loader(cfg)))
    times = []
    with EventStorage():
        for number in range(rounds + 1):
            times.append([time_step(model, batch, optimizer, None)])
            with StatisticsRecorder(model, cfg.STATISTICS.LAYERS, period=2**30) as recorder:
                times[number].append(time_step(model, batch, optimizer, recorder))
                times[number].append(time_step(model, batch, optimizer, recorder))
    return len(recorder.layers), times[1:]


def main() -> None:
    args = parse_arguments()
    with errors_in_one_line():
        bring_in(args)
        cfg = load_config(args.config_file, args.opts)
        norms, times = measure(cfg, args.rounds)
    off, on, between = (statistics.median(column) for column in zip(*times))
    period_1 = statistics.median(t[1] / t[0] for t in times)
    period_20 = statistics.median((t[1] + 19 * t[2]) / 20 / t[0] for t in times)
    print(f"PyTorch {torch.__version__}, {cfg.MODEL.DEVICE}, {torch.get_num_threads()} threads,")
    print(
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {norms} norms, {args.rounds} rounds"
    )
    print(f"off {off:.3f} s, recorded {on:.3f} s, between {between:.3f} s")
    print(f"PERIOD 1 / off: {period_1:.3f}, PERIOD 20 / off: {period_20:.3f}")


if __name__ == "__main__":
    sys.exit(main())
