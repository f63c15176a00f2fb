#!/usr/bin/env python
"""
Measures on a GPU all that the documents want to know of one, in stages, most wanted first.

    correct    the norms' numbers against float64 on the CPU, and the authors' recorded ones
    layers     time, memory and bandwidth of each norm on the inputs of Mask R-CNN R50-FPN
    training   time and memory of a training step of Mask R-CNN R50-FPN
    inference  ResNet-50 with each norm, as it is and folded
    workers    two workers on the one GPU: averaged statistics, training, checkpoint
    accuracy   the demo from scratch with each norm, as long as the time allows

Each stage writes its CSV file row by row, and is over within its limit. A second call measures what is
missing, and what failed, once more. report.md has it all as tables. Needs nothing but what
requirements name; see docs/gpu.md for a machine that lacks Detectron2.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from mabn_d2.benchmark.gpu import STAGES
from mabn_d2.benchmark.gpu.report import write_report
from mabn_d2.benchmark.gpu.stage import Options, find_device, run_stage
from mabn_d2.utils.command_line import errors_in_one_line, without_usage
from mabn_d2.utils.results import Results

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 450  # seconds of a stage


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = without_usage(
        argparse.ArgumentParser(
            prog="benchmark_gpu.py",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"of {', '.join(STAGES)}; by default all, in order",
    )
    parser.add_argument("--out", type=Path, default=Path("output/gpu"), metavar="FOLDER")
    parser.add_argument(
        "--release", metavar="FILE.py", help="the authors' MABN.py, which is timed beside the norms"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, into FOLDER/tiny: does everything run?"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="SECONDS",
        help=f"of a stage, {LIMIT} by default",
    )
    arguments = parser.parse_args(argv)
    for stage in arguments.stages:
        if stage not in STAGES:
            parser.error(f"no stage {stage!r}; there are {', '.join(STAGES)}")
    if arguments.release and not Path(arguments.release).is_file():
        parser.error(f"--release: no such file: {arguments.release}")
    if arguments.tiny:
        arguments.out /= "tiny"
    return arguments


def run(arguments: argparse.Namespace) -> bool:
    """
    Returns:
        whether nothing is left to be measured, nothing failed and nothing is wrong.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = {
        stage.file: Results(arguments.out / stage.file, stage.keys, stage.values)
        for stage in STAGES.values()
    }
    device = find_device()
    if device is None:
        raise ValueError("PyTorch finds no GPU; without one: make gpu-rehearsal")
    for results in files.values():
        for row in results.rows:
            if (row["device"], row["torch"]) != device[:2]:
                raise ValueError(
                    f"{results.path} has results of {row['device']}, PyTorch {row['torch']}; this is "
                    f"{device.device}, PyTorch {device.torch}: name another folder (--out)"
                )
    complete = True
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.stages or STAGES:
            stage, results = STAGES[name], files[STAGES[name].file]
            options = Options(
                ROOT, arguments.out, Path(scratch), arguments.tiny, arguments.release,
                time.monotonic() + arguments.limit,
            )  # fmt: skip
            print(f"== {name}", flush=True)
            left = run_stage(stage, results, options, device)
            write_report(arguments.out / "report.md", files, device, arguments.tiny)
            if left:
                cases = "; ".join(", ".join(filter(None, case.values())) for case in left)
                print(f"{name}: time is up, {len(left)} left: {cases}", flush=True)
            rows = [row for case in stage.cases(options) for row in results.of(case)]
            wrong = [row for row in rows if row["error"] or row.get("ok") == "no"]
            if wrong:
                print(f"{name}: {len(wrong)} rows failed, see {results.path}", flush=True)
            complete = complete and not left and not wrong
    print(f"Report: {arguments.out / 'report.md'}")
    return complete


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        with errors_in_one_line():
            return 0 if run(arguments) else 1
    except KeyboardInterrupt:
        print("benchmark_gpu.py: interrupted; what was measured is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
