"""
A stage: cases that are measured one by one, in a process of their own and within a time limit.

The process is forked before CUDA is in use. What a case breaks, be it the process or its hold on the GPU,
costs this case and nothing else: a new process goes on with the next one.
"""

import datetime
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...utils.command_line import one_line
from ...utils.results import Results

_FORK = multiprocessing.get_context("fork")
Case = dict[str, str]


class Options(NamedTuple):
    """What a measurement can depend on."""

    root: Path  # of the repository
    out: Path  # folder of the results
    scratch: Path  # a folder for temporary files, which lasts as long as the program
    tiny: bool = False  # everything small, to see that it runs
    release: str | None = None  # file of another implementation of MABN
    deadline: float = float("inf")  # of `time.monotonic()`


class Stage(NamedTuple):
    """What is measured, and where it is written."""

    name: str
    file: str
    keys: Sequence[str]  # columns that tell one case from another
    values: Sequence[str]  # further columns
    cases: Callable[[Options], list[Case]]  # most wanted first
    # Further columns of each row of a case. Runs in the stage's process.
    measure: Callable[[Case, Options], Iterable[Mapping[str, Any]]]


class Device(NamedTuple):
    """As PyTorch and the driver report it."""

    device: str
    torch: str
    driver: str


def find_device() -> Device | None:
    """The GPU, None where there is none. CUDA is not in use afterwards."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=lambda: sender.send(_describe_device()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # it died
        return None
    finally:
        process.join()


def _describe_device() -> Device | None:
    if not torch.cuda.is_available():
        return None
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return Device(torch.cuda.get_device_name(), torch.__version__, driver)


def run_stage(stage: Stage, results: Results, options: Options, device: Device) -> list[Case]:
    """
    Measures what the results lack, and what failed in an earlier call.

    Args:
        options: with the `deadline` of this stage. A case is begun only if the longest so far would
            end before it, and is cut off there.

    Returns:
        the cases that are left to be measured. Those that failed have a row that says so.
    """
    origin = {"device": device.device, "torch": device.torch, "date": str(datetime.date.today())}
    pending = results.pending(stage.cases(options))
    results.forget(pending)
    while pending and time.monotonic() < options.deadline:
        process = _FORK.Process(target=_measure, args=(stage, pending, results, options, origin))
        process.start()
        try:
            process.join(options.deadline - time.monotonic())
            was_cut_off = process.is_alive()
        finally:  # an interruption included
            process.kill()
            process.join()
        results.load()
        pending = [case for case in pending if not results.of(case)]
        if process.exitcode == 0:
            break
        if process.exitcode != _FAILED and pending:
            reason = (
                "cut off when the stage's time was up"
                if was_cut_off
                else f"its process {_ending(process.exitcode)}"
            )
            _fail(results, pending.pop(0), reason, origin)
    return pending


_FAILED = 3  # exit status after a case that failed and has its row


def _measure(
    stage: Stage, cases: list[Case], results: Results, options: Options, origin: Case
) -> None:
    """Runs in the process of its own."""
    status, longest = 0, 0.0
    for case in cases:
        begin = time.monotonic()
        if begin + longest > options.deadline:
            break
        try:
            rows = [_as_text(row) for row in stage.measure(case, options)]
        except Exception as error:
            traceback.print_exc()
            _fail(results, case, one_line(error), origin)
            status = _FAILED  # of what is broken now, this process may have more
            break
        results.replace(case, [origin | row for row in rows])
        seconds = time.monotonic() - begin
        longest = max(longest, seconds)
        print(f"{stage.name}: {_name(case)}: {seconds:.1f} s", flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an ordinary exit aborts now and then, as threads of PyTorch's still run


def _fail(results: Results, case: Case, reason: str, origin: Case) -> None:
    print(f"{_name(case)}: {reason}", file=sys.stderr, flush=True)
    results.replace(case, [origin | {"error": reason}])


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _name(case: Mapping[str, str]) -> str:
    return ", ".join(value for value in case.values() if value)


def _as_text(row: Mapping[str, Any]) -> Case:
    """Numbers with six digits."""
    return {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()}
