"""Runs a plan: each run in a process of its own, a few at a time, until none is left."""

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ..data.catalog import shapes_files
from ..utils.command_line import one_line
from ..utils.files import atomic_write
from ..utils.results import Results
from . import job
from .measure import measure
from .plan import TOOLS, Plan, Run, candidates

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "block", "task", "level", "protocol", "norm", "norm_batch", "workers", "lr", "lr_from", "seed", "weights",
    "box_ap", "mask_ap", "top1_error", "found", "last_aps", "ap_by_look", "other_aps", "ap_at_start",
    "iterations", "seconds", "commit", "copy_of", "command",
)  # fmt: skip
CURVE_COLUMNS = ("iteration", "box_ap", "mask_ap", "top1_error", "loss")
MATTERS = ("mabn_d2", "tools", "configs")  # what runs depend on
POLL = 1.0  # seconds


def open_results(plan: Plan) -> tuple[Results, Results]:
    """The rows of the runs, and of their learning curves."""
    return Results(plan.results, ("run",), COLUMNS), Results(
        plan.curves, ("run",), CURVE_COLUMNS, ()
    )


def chosen_lr(plan: Plan, run: Run, rows: dict[str, dict[str, str]]) -> float | None:
    """
    The learning rate of the best mean result, or the lower one of two.

    One with a failed run is worse than any without.

    Returns:
        None while runs that decide it are missing.

    Raises:
        ValueError: all of them have failed.
    """
    if not run.lr_block:
        return run.lr
    others = candidates(plan.block(run.lr_block), run)
    if any(other.id not in rows for other in others):
        return None
    means = {}
    metric = run.tool.metrics[0]
    for lr in sorted({other.lr for other in others if other.lr is not None}):
        tried = [rows[other.id] for other in others if other.lr == lr]
        if not any(row["error"] for row in tried):
            mean = statistics.fmean(float(row[metric]) for row in tried)
            means[lr] = -mean if metric == "top1_error" else mean
    if not means:
        raise ValueError(f"no run of block {run.lr_block} has succeeded with {run.lr_norm}")
    return max(means, key=means.__getitem__)


def remaining(
    plan: Plan, rows: dict[str, dict[str, str]], jobs: int, runs: Iterable[Run] | None = None
) -> str:
    """An estimate of the time that runs take, by default all without a row, from others that resemble them."""
    known: dict[tuple, list[float]] = {}

    def kinds(run: Run) -> list[tuple]:
        kind = run.task, run.images, run.workers, run.virtual_workers
        return [(*kind, run.norm), kind]

    for run in plan.runs:
        row = rows.get(run.id)
        if row and not row["error"] and not row["copy_of"]:
            for kind in kinds(run):
                known.setdefault(kind, []).append(float(row["seconds"]))
    total, unknown = 0.0, 0
    if runs is None:
        runs = (run for run in plan.runs if run.id not in rows)
    for run in runs:
        similar = next((known[kind] for kind in kinds(run) if kind in known), None)
        if similar is None:
            unknown += 1
        else:
            left = statistics.fmean(similar) - job.seconds_of(folder_of(plan, run))
            total += max(0.0, left) * min(run.slots, jobs)
    others = f" and {unknown} runs of unknown length" if unknown else ""
    return f"{hours(total / jobs)}{others}"


def outdated(plan: Plan, rows: dict[str, dict[str, str]]) -> list[str]:
    """The runs whose row is of another version of the plan, or of another learning rate than is the best now."""
    old = []
    for run in plan.runs:
        if row := rows.get(run.id):
            lr = float(row["lr"]) if row["lr"] else None
            if not row["error"]:
                with contextlib.suppress(ValueError):  # the runs that decide it have failed since
                    lr = chosen_lr(plan, run, rows) or lr
            if (row["command"], row["weights"]) != (run.command(lr), run.start):
                old.append(run.id)
    return old


def superseded(rows: dict[str, dict[str, str]], again: Iterable[str] = ()) -> set[str]:
    """
    The runs that start from the weights of a run that has been trained again since, and copies of such.

    Args:
        rows: in the order in which they were recorded.
        again: runs that will be trained again, which are among those returned.
    """
    order = {name: position for position, name in enumerate(rows)}
    old = set(again)
    for name, row in rows.items():
        origins = row["weights"].split(", ")[0], row["copy_of"]
        if any(order.get(origin, -1) > order[name] or origin in old for origin in origins):
            old.add(name)
    return old


def progress(plan: Plan, name: str) -> int:
    """The last iteration that a run has logged, which the plan need not have any more."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        lines = (plan.output / "runs" / name / "metrics.json").read_text().splitlines()
        return int(json.loads(lines[-1])["iteration"]) + 1
    return 0


def folder_of(plan: Plan, run: Run) -> Path:
    return plan.output.resolve() / "runs" / run.id


@contextlib.contextmanager
def only_runner(plan: Plan) -> Iterator[int]:
    """
    Holds the plan's lock, which the processes of runs inherit: those that outlast a runner count as one.

    Raises:
        ValueError: another one holds it.
    """
    plan.output.mkdir(parents=True, exist_ok=True)
    with open(plan.output / "lock", "a") as lock:
        for attempt in range(5, -1, -1):  # whoever asks for the state holds it for a moment
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt:
                    time.sleep(0.1)
                    continue
                raise ValueError(
                    f"{plan.output}/lock is held: a runner of {plan.file} is at work, or runs that have outlived it"
                ) from None
        yield lock.fileno()


def is_running(plan: Plan) -> bool:
    if not (plan.output / "lock").exists():
        return False
    try:
        with only_runner(plan):
            return False
    except ValueError:
        return True


# ---- where runs run ------------------------------------------------------------------------------


class Local:
    """Processes of this machine, each with a group of its own."""

    def __init__(self, lock: int):
        self._lock = lock

    def start(self, folder: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, job.__file__, str(folder)],
            start_new_session=True,
            pass_fds=[self._lock],
        )

    def is_done(self, process: subprocess.Popen) -> bool:
        return process.poll() is not None

    def signal(self, process: subprocess.Popen, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def stop(self, process: subprocess.Popen) -> None:
        self.signal(process, signal.SIGKILL)  # a checkpoint is whole or not there
        process.wait()


class Cluster:
    """
    Jobs that submitit submits.

    Args:
        kind: "slurm"; "local" and "debug" are for a try without a cluster.
        options: of submitit's `update_parameters`.

    Raises:
        ValueError: submitit is missing, or an option is not known to it.
    """

    def __init__(self, kind: str, folder: Path, options: dict[str, Any]):
        try:
            import submitit
        except ImportError as error:
            raise ValueError("--cluster needs submitit: pip install submitit") from error
        self._executor = submitit.AutoExecutor(folder=folder, cluster=kind)
        try:
            self._executor.update_parameters(**options)
        except (NameError, TypeError) as error:
            raise ValueError(f"--cluster: {error}") from error

    def start(self, folder: Path):
        return self._executor.submit(job.execute, str(folder))

    def is_done(self, handle) -> bool:
        return handle.done()

    def signal(self, handle, number: int) -> None:
        """Jobs that a cluster has begun go on."""

    def stop(self, handle) -> None:
        handle.cancel()


# ---- code that runs run from ---------------------------------------------------------------------


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def current_commit(plan: Plan, dirty: bool) -> str:
    """
    The commit that is checked out; with `+dirty` if it is not what runs would run.

    Raises:
        ValueError: it is not, and `dirty` does not allow that; or there is no repository.
    """
    commit = _git("rev-parse", "HEAD")[:12]
    own = (
        [f":!{plan.file.resolve().relative_to(ROOT)}"]
        if ROOT in plan.file.resolve().parents
        else []
    )
    changed = _git("status", "--porcelain", "--", *MATTERS, *own).splitlines()
    if not changed:
        return commit
    if not dirty:
        names = ", ".join(line[2:].strip() for line in changed[:5])
        raise ValueError(
            f"{len(changed)} files are not committed: {names}. Commit them, or use --dirty"
        )
    return f"{commit}+dirty"


def checkout(plan: Plan, commit: str) -> Path:
    """A folder with the files of a commit, which further work does not touch."""
    if commit.endswith("+dirty"):
        return ROOT
    folder = plan.output.resolve() / "worktrees" / commit
    if not (folder / "tools").exists():
        _git("worktree", "prune")
        _git("worktree", "add", "--detach", str(folder), commit)
    return folder


# ---- the runner ----------------------------------------------------------------------------------


class Runner:
    """
    Starts the runs in the order of the plan, each as soon as what it depends on is there.

    An interrupted run goes on from its last checkpoint, with the commit that it began with. A run whose
    command another one had is not repeated, its row is a copy. One that a missing run starts from and whose
    weights are gone, as in a new clone, is trained again, and then all that start from it.
    """

    def __init__(
        self, plan: Plan, launcher: Local | Cluster, jobs: int, dirty: bool = False, blocks: Iterable[str] = ()
    ):  # fmt: skip
        """
        Args:
            jobs: how many run at a time; a run counts as its protocol's `slots`.
            dirty: whether to run code that is not committed.
            blocks: those that are run; by default all.
        """
        self.plan, self.launcher, self.jobs, self.dirty = plan, launcher, jobs, dirty
        self.commit = current_commit(plan, dirty)
        self.datasets = os.path.abspath(
            os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        )
        if not os.path.isdir(self.datasets):
            raise ValueError(f"$DETECTRON2_DATASETS: there is no folder {self.datasets}")
        names = list(blocks) or plan.blocks_names
        self.todo = [run for name in names for run in plan.block(name).runs]
        for config in sorted({run.config for run in self.todo}):
            if not (ROOT / config).is_file():
                raise ValueError(f"{plan.file}: the config {config} does not exist")
        self._check_data()
        plan.results.parent.mkdir(parents=True, exist_ok=True)
        self.results, self.curves = open_results(plan)
        self.again: set[str] = set()  # ids of runs that have a row and run nevertheless
        self.running: dict[str, tuple[Run, Any]] = {}
        self.lrs: dict[str, float | None] = {}
        self.paused = False

    def _check_data(self) -> None:
        files = shapes_files(self.datasets)
        for run in self.todo:
            for key, names in run.options.items():
                for name in names if key.startswith("DATASETS.") else ():
                    if name in files and not os.path.isfile(files[name]):
                        raise ValueError(
                            f"$DETECTRON2_DATASETS: {run.id} needs {files[name]}, which does not exist. "
                            "`make datasets/study` draws all of them"
                        )

    def _put_lost_sources_first(self) -> None:
        """Has the runs trained again that others start from and whose weights are not there any more."""
        known = {run.id: run for run in self.plan.runs}
        lost: dict[str, Run] = {}
        starting = self._left()
        for run in starting:
            row = self.rows.get(run.weights)
            if row is None or row["error"] or self._trained(run).exists():
                continue
            source = row["copy_of"] or row["run"]
            if source not in known:
                raise ValueError(
                    f"{run.id} starts from {self._trained(run)}, which does not exist; nor has "
                    f"{self.plan.file} the run {source} any longer"
                )
            if source not in lost:
                lost[source] = known[source]
                starting.append(known[source])  # which may start from another one
        self.again = set(lost)
        self.todo = [*lost.values(), *(run for run in self.todo if run.id not in lost)]
        self._check_data()

    def _trained(self, run: Run) -> Path:
        """The weights of the run that a run starts from."""
        source = self.rows[run.weights]["copy_of"] or run.weights
        return self.plan.output.resolve() / "runs" / source / "model_final.pth"

    @property
    def rows(self) -> dict[str, dict[str, str]]:
        return {row["run"]: row for row in self.results.rows}

    def retry_failed(self) -> None:
        """Forgets runs that failed, which then start anew."""
        failed = [{"run": run.id} for run in self.todo if self.rows.get(run.id, {}).get("error")]
        self.results.forget(failed)
        for row in failed:
            shutil.rmtree(self.plan.output / "runs" / row["run"], ignore_errors=True)

    def run(self) -> None:
        """Until all runs have a row, or the ones that are left depend on one that failed or is left out."""
        self._put_lost_sources_first()
        done = len(self.todo) - len(self._left())
        self.bar = tqdm(total=len(self.todo), initial=done, unit="run", disable=None)
        try:
            with self.bar:
                while True:
                    self._collect()
                    self._pause()
                    if not self.paused and not self._start_next() and not self.running:
                        return
                    self._write_status()
                    time.sleep(POLL)
        finally:
            for _, handle in self.running.values():
                self.launcher.stop(handle)
            (self.plan.output / "running.json").unlink(missing_ok=True)

    # -- what a run needs

    def _left(self) -> list[Run]:
        rows = self.rows
        again = superseded(rows, self.again)
        return [run for run in self.todo if run.id not in rows or run.id in again]

    def _start_next(self) -> bool:
        """Starts what can be started; whether that was anything."""
        started = False
        left = self._left()
        names = {run.id for run in left}
        done = {name: row for name, row in self.rows.items() if name not in names}
        for run in left:
            if run.id in self.running:
                continue
            free = self.jobs - sum(r.slots for r, _ in self.running.values())
            if free < min(run.slots, self.jobs):
                break  # in the order of the plan: no smaller one goes first
            try:
                ready = self._is_ready(run, done)
            except ValueError as error:
                self._record(run, {"error": str(error), "date": str(datetime.date.today())})
                started = True
                continue
            if ready:
                if run.id in self.again or not self._copy(run):
                    self._start(run)
                started = True
        return started

    def _is_ready(self, run: Run, rows: dict[str, dict[str, str]]) -> bool:
        """
        Args:
            rows: those that count.

        Raises:
            ValueError: it never will be.
        """
        if run.weights and not run.weights_file:
            row = rows.get(run.weights)
            if row is None:
                return False
            if row["error"]:
                raise ValueError(f"the run {run.weights} that it starts from has failed")
        lr = chosen_lr(self.plan, run, rows)
        if lr is None and run.lr_block:
            return False
        self.lrs[run.id] = lr
        key = run.command(lr), run.start
        others = [other for other, _ in self.running.values()]
        return all((other.command(self.lrs[other.id]), other.start) != key for other in others)

    def _copy(self, run: Run) -> bool:
        """Takes the row of a run with the same command, if there is one."""
        command = run.command(self.lrs[run.id])
        old = superseded(self.rows, self.again)
        for row in self.results.rows:
            usable = (
                not row["error"]
                and row["run"] not in old
                and (self.dirty or not row["commit"].endswith("+dirty"))
            )
            if (row["command"], row["weights"]) == (command, run.start) and usable:
                self._record(run, {**row, "copy_of": row["copy_of"] or row["run"]})
                return True
        return False

    def _start(self, run: Run) -> None:
        folder = folder_of(self.plan, run)
        lr = self.lrs[run.id]
        origin = {"command": run.command(lr), "weights": run.start, "commit": self.commit}
        if source := self.rows.get(run.weights):  # tells one training of it from another
            origin["trained"] = f"{source['date']}, {source['seconds']} s"
        with contextlib.suppress(OSError, ValueError):
            before = json.loads((folder / "origin.json").read_text())
            usable = self.dirty or not before["commit"].endswith("+dirty")
            if {**before, "commit": self.commit} == origin and usable:
                origin = before
            else:
                shutil.rmtree(folder)
        if run.id in self.rows and (folder / "done.json").exists():  # it is repeated
            shutil.rmtree(folder)
        if (folder / "done.json").exists():  # a runner was ended before it wrote the row
            return self._finish(run)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "origin.json", origin)
        code = checkout(self.plan, origin["commit"])
        paths = [str(code), *filter(None, [os.getenv("PYTHONPATH")])]
        environment = {
            "OMP_NUM_THREADS": os.getenv("OMP_NUM_THREADS", "1"),
            "PYTHONPATH": os.pathsep.join(paths),
            "DETECTRON2_DATASETS": self.datasets,
            # Else memory goes back to the system after each step and is asked for again in the next.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": "20000000000",
        }
        commands = self._commands(run, folder)
        task = {"commands": commands, "folder": str(code), "environment": environment}
        _write_json(folder / "job.json", task)
        chosen = f", LR {lr:g} (best of {run.lr_block})" if run.lr_block else ""
        why = "its weights are gone" if run.id in self.again else "from weights that are new"
        again = f" again, {why}" * (run.id in self.rows)
        self.bar.write(f"{run.id}: starts{again}{chosen}")
        self.running[run.id] = run, self.launcher.start(folder)

    def _commands(self, run: Run, folder: Path) -> list[dict[str, Any]]:
        tool, arguments, commands = run.tool, run.arguments(self.lrs[run.id]), []
        weights = run.weights
        if weights and not run.weights_file:
            weights = str(self._trained(run))
        if run.weights_as:
            source, weights = weights, str(folder / "weights.pth")
            rewrite = ["-m", "mabn_d2.study.weights_as", run.weights_as, source, weights]
            commands.append({"arguments": [sys.executable, *rewrite], "creates": weights})
        start = tool.options({tool.weights: weights}) if weights else []
        if weights and tool is TOOLS["train_net"]:
            result = str(folder / "at_start.json")
            output = tool.options({tool.output: str(folder / "at_start")})
            evaluate = ["-m", "mabn_d2.study.at_start", result, *arguments, *start, *output]
            commands.append({"arguments": [sys.executable, *evaluate], "creates": result})
        train = [tool.file, "--resume", "--dist-url", "auto", *arguments, *start]
        train += tool.options({tool.output: str(folder)})
        commands.append({"arguments": [sys.executable, *train], "creates": ""})
        return commands

    # -- what becomes of it

    def _collect(self) -> None:
        for run, handle in list(self.running.values()):
            if self.launcher.is_done(handle):
                del self.running[run.id]
                self._finish(run)

    def _finish(self, run: Run) -> None:
        folder = folder_of(self.plan, run)
        row: dict[str, Any] = {"error": "its process ended without a result"}
        with contextlib.suppress(OSError):
            row = json.loads((folder / "done.json").read_text())
        curve: list[dict[str, Any]] = []
        try:
            values, curve = measure(run, folder)
            row = {**values, **row}
        except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
            row["error"] = row["error"] or f"its results cannot be read: {one_line(error)}"
        row["commit"] = json.loads((folder / "origin.json").read_text())["commit"]
        self._record(run, row, curve)
        if not row["error"]:
            for checkpoint in folder.glob("model_[0-9]*.pth"):
                checkpoint.unlink()

    def _record(self, run: Run, row: dict[str, Any], curve: Iterable[dict[str, Any]] = ()) -> None:
        lr = self.lrs.get(run.id)
        fixed = {
            "block": run.block, "task": run.task, "level": run.level, "protocol": run.protocol,
            "norm": run.norm, "norm_batch": run.norm_batch, "workers": run.workers * run.virtual_workers,
            "lr": "" if lr is None else f"{lr:g}", "lr_from": run.lr_block, "seed": run.seed,
            "weights": run.start, "command": run.command(lr),
        }  # fmt: skip
        row = {key: _as_text(value) for key, value in {**row, **fixed, "run": run.id}.items()}
        points = [{k: _as_text(v) for k, v in point.items()} for point in curve]
        self.curves.replace({"run": run.id}, points)
        self.results.replace({"run": run.id}, [row])
        self.again.discard(run.id)
        ap = " / ".join(f"{float(row[m]):.2f}" for m in run.tool.metrics if row.get(m))
        self.bar.update()
        self.bar.write(f"{run.id}: {row.get('error') or ap}" + " (copy)" * bool(row.get("copy_of")))

    # -- pausing and telling

    def _pause(self) -> None:
        wanted = (self.plan.output / "PAUSE").exists()
        if wanted != self.paused:
            self.paused = wanted
            self.bar.write("paused" if wanted else "goes on")
            for _, handle in self.running.values():
                self.launcher.signal(handle, signal.SIGSTOP if wanted else signal.SIGCONT)

    def _write_status(self) -> None:
        left = remaining(self.plan, self.rows, self.jobs, self._left())
        self.bar.set_postfix_str(
            f"{len(self.running)} running, left: {left}", refresh=False
        )  # fmt: skip
        status = {"jobs": self.jobs, "running": list(self.running)}
        if status != getattr(self, "_status", None):
            self._status = status
            _write_json(self.plan.output / "running.json", status)


def hours(seconds: float) -> str:
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def _as_text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write_json(file: Path, content: Any) -> None:
    with atomic_write(str(file), "w") as f:
        json.dump(content, f)
