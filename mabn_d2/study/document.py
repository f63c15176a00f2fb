"""The study's document: what is written by hand stays, what is between two markers follows from the results."""

import os
import re
from pathlib import Path

from ..utils.files import atomic_write
from . import tables
from .figures import FIGURES, Curves
from .plan import Block, Plan
from .runner import hours
from .tables import Rows

_PART = re.compile(r"(<!-- generated: (\w+) ?([\w.-]*) -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLES = {
    "table": tables.block_table,
    "differences": tables.difference_table,
    "failures": tables.failures,
}


def write_document(plan: Plan, rows: Rows, curves: Curves) -> None:
    """
    Renews the generated parts of the plan's document, and the pictures that they show.

    A part begins with `<!-- generated: KIND BLOCK -->`, the kinds being table, differences, failures, curves,
    norm_batch, looks and train_test, or with `<!-- generated: runs -->`, and ends with `<!-- end -->`. Without
    the file, one with a section for each block is written.

    Raises:
        ValueError: a kind or block is not known.
    """
    path = plan.document
    text = path.read_text() if path.exists() else _skeleton(plan)

    def renew(match: re.Match) -> str:
        begin, kind, name, end = match.groups()
        if kind == "runs":
            content = _runs(plan, rows)
        elif kind in _TABLES:
            content = _TABLES[kind](plan.block(name), rows)
        elif kind in FIGURES:
            content = _figure(plan, kind, plan.block(name), rows, curves)
        else:
            kinds = ", ".join(["runs", *_TABLES, *FIGURES])
            raise ValueError(f"{path}: no part of kind {kind!r}; there are {kinds}")
        return f"{begin}{content}{content and chr(10)}{end}"

    text = _PART.sub(renew, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(str(path), "w") as f:
        f.write(text)


def _skeleton(plan: Plan) -> str:
    parts = [f"# Study: {plan.file.stem}", _part("runs")]
    for block in plan.blocks:
        kinds = ["table", *(["differences"] if block.differences else []), "curves", "failures"]
        parts += [f"## {block.title}", *(_part(f"{kind} {block.name}") for kind in kinds)]
    return "\n\n".join(parts) + "\n"


def _part(name: str) -> str:
    return f"<!-- generated: {name} -->\n<!-- end -->"


def _figure(plan: Plan, kind: str, block: Block, rows: Rows, curves: Curves) -> str:
    picture = plan.images / f"{plan.file.stem}_{block.name}_{kind}.png"
    picture.unlink(missing_ok=True)
    FIGURES[kind](plan, block, rows, curves, picture)
    if not picture.exists():
        return "not run"
    link = os.path.relpath(picture.resolve(), plan.document.resolve().parent)
    return f"![{kind.replace('_', ' ')}: {block.title}]({Path(link).as_posix()})"


def _runs(plan: Plan, rows: Rows) -> str:
    """Where, when and how long."""
    there = [rows[run.id] for run in plan.runs if run.id in rows]
    own = [row for row in there if not row["copy_of"]]
    seconds = sum(float(row["seconds"] or 0) for row in own)
    dates, devices, commits, torches = (
        sorted({row[key] for row in own if row[key]}) for key in ("date", "device", "commit", "torch")
    )  # fmt: skip
    failed = sum(bool(row["error"]) for row in there)
    lines = [
        f"{len(there)} of {len(plan.runs)} runs, {failed} of which failed; {hours(seconds)} of processes.",
        f"{'; '.join(devices)}. PyTorch {', '.join(torches)}. {' to '.join(sorted({*dates[:1], *dates[-1:]}))}.",
        f"Commits: {', '.join(commits)}.",
    ]
    return "\n".join(lines + ["", tables.status_table(plan, rows, ())]) if there else "not run"
