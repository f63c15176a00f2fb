"""Tables of a study's results: means with their standard error, and differences."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .plan import Block, Plan, Run
from .runner import hours

Rows = dict[str, dict[str, str]]
NAMES = {"box_ap": "box AP", "mask_ap": "mask AP", "top1_error": "top-1 error (%)"}


class Mean(NamedTuple):
    """`error` is the standard error of the mean; NaN for one value."""

    mean: float
    error: float
    n: int

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.1f}"
        return f"{self.mean:.1f}{error}"


def mean(values: Sequence[float]) -> Mean:
    """
    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if not n:
        raise ValueError("a mean of no values")
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Mean(statistics.fmean(values), error, n)


def difference(a: dict[int, float], b: dict[int, float]) -> Mean:
    """
    The mean of a - b by seed, over the seeds that both have.

    Without any such seed, the difference of the means, whose errors add up as independent ones do.
    """
    shared = sorted(set(a) & set(b))
    if shared:
        return mean([a[seed] - b[seed] for seed in shared])
    of_a, of_b = mean(list(a.values())), mean(list(b.values()))
    error = math.hypot(of_a.error, of_b.error)
    return Mean(of_a.mean - of_b.mean, error, min(of_a.n, of_b.n))


def by_seed(runs: Sequence[Run], rows: Rows, metric: str) -> dict[int, float]:
    """Of the runs that have succeeded."""
    return {
        run.seed: float(rows[run.id][metric])
        for run in runs
        if run.id in rows and not rows[run.id]["error"]
    }


class Cells:
    """The runs of a block by norm (rows) and by what else differs but the seed (columns)."""

    def __init__(self, block: Block):
        self.block = block
        self.norms = list(dict.fromkeys(run.norm for run in block.runs))
        self.columns = list(dict.fromkeys(map(_column, block.runs)))

    def runs(self, norm: str, column: tuple) -> list[Run]:
        return [run for run in self.block.runs if (run.norm, _column(run)) == (norm, column)]

    def heading(self, column: tuple) -> str:
        level, protocol, lr = column
        return ", ".join(
            [*filter(None, [level, protocol]), *([] if lr is None else [f"LR {lr:g}"])]
        )


def _column(run: Run) -> tuple[str, str, float | None]:
    return run.level, run.protocol, run.lr


def block_table(block: Block, rows: Rows) -> str:
    """Mean ± standard error for each norm; what failed or is not run says so."""
    cells = Cells(block)
    metrics = " / ".join(NAMES[metric] for metric in block.tool.metrics)
    head = [f"{metrics}", *map(cells.heading, cells.columns)]
    body = [
        [norm, *(_cell(block, cells.runs(norm, column), rows) for column in cells.columns)]
        for norm in cells.norms
    ]
    starts = [_start(cells, norm, rows) for norm in cells.norms]
    if any(starts):
        head.insert(1, "box AP before the first step")
        for line, start in zip(body, starts):
            line.insert(1, start or "-")
    return markdown(head, body)


def _start(cells: Cells, norm: str, rows: Rows) -> str:
    """What a norm makes of the weights, which no learning rate has changed yet."""
    runs = [
        run
        for column in cells.columns
        for run in cells.runs(norm, column)
        if rows.get(run.id, {}).get("ap_at_start")
    ]
    values = by_seed(runs, rows, "ap_at_start")
    return str(mean(list(values.values()))) if values else ""


def _cell(block: Block, runs: Sequence[Run], rows: Rows) -> str:
    there = [rows[run.id] for run in runs if run.id in rows]
    failed = sum(bool(row["error"]) for row in there)
    if not there:
        return "not run"
    text = " / ".join(
        str(mean(list(values.values())))
        for metric in block.tool.metrics
        if (values := by_seed(runs, rows, metric))
    )
    notes = [f"{failed} of {len(runs)} failed"] if failed else []
    if len(there) < len(runs):
        notes.append(f"{len(runs) - len(there)} of {len(runs)} not run")
    return f"{text} ({', '.join(notes)})".strip() if notes else text


def difference_table(block: Block, rows: Rows) -> str:
    """The block's `differences`, paired by seed."""
    cells = Cells(block)
    metrics = " / ".join(NAMES[metric] for metric in block.tool.metrics)
    body = []
    for a, b in block.differences:
        line = [f"{a} − {b}"]
        for column in cells.columns:
            parts = []
            for metric in block.tool.metrics:
                of_a, of_b = (by_seed(cells.runs(n, column), rows, metric) for n in (a, b))
                if of_a and of_b:
                    parts.append(f"{difference(of_a, of_b)}".replace("-", "−"))
            line.append(" / ".join(parts) or "not run")
        body.append(line)
    return markdown([metrics, *map(cells.heading, cells.columns)], body) if body else ""


def failures(block: Block, rows: Rows) -> str:
    """The runs that failed, with the reason."""
    failed = [run.id for run in block.runs if rows.get(run.id, {}).get("error")]
    return "\n".join(f"- `{name}`: {rows[name]['error']}" for name in failed)


def status_table(plan: Plan, rows: Rows, running: Sequence[str]) -> str:
    """Runs of each block by their state, and the hours that they took."""
    body = []
    for block in plan.blocks:
        there = [rows[run.id] for run in block.runs if run.id in rows]
        seconds = sum(float(r["seconds"] or 0) for r in there if not r["copy_of"])
        failed = sum(bool(row["error"]) for row in there)
        at_work = sum(run.id in running for run in block.runs)
        counts = len(there) - failed, failed, at_work, len(block.runs) - len(there) - at_work
        body.append([block.name, *map(str, counts), hours(seconds)])
    return markdown(["block", "done", "failed", "running", "not run", "process time"], body)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose source is aligned, too."""
    widths = [max(map(len, column)) for column in zip(head, *body)]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )
