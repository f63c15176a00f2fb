#!/usr/bin/env python
"""
Runs a study: the grids of training runs of a plan, with their results in a CSV file.

    tools/study.py configs/study/shapes.yaml run --jobs 2
    tools/study.py configs/study/shapes.yaml run --cluster slurm --partition gpu --jobs 8
    tools/study.py configs/study/shapes.yaml status      # also while it runs
    tools/study.py configs/study/shapes.yaml table       # the results so far
    tools/study.py configs/study/shapes.yaml document    # renews the plan's document and figures
    tools/study.py configs/study/shapes.yaml pause       # runs stop until `resume`

A run that has a row in the CSV file is not repeated, an interrupted one goes on from its last checkpoint. Runs
train the commit that is checked out at the start, from a worktree below the output folder.
"""

import argparse
import json
import signal
import sys

from mabn_d2.study import document, runner, tables
from mabn_d2.study.plan import load_plan
from mabn_d2.utils.command_line import errors_in_one_line, without_usage


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", metavar="PLAN", help="YAML file, see configs/study/README.md")
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("blocks", nargs="*", metavar="BLOCK", help="of run and table; default: all")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time; default: 1"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run what failed once more")
    parser.add_argument("--dirty", action="store_true", help="run files that are not committed")
    parser.add_argument("--cluster", metavar="KIND", help="submit through submitit: slurm")
    parser.add_argument("--partition", help="of SLURM")
    parser.add_argument(
        "--cluster-option", action="append", default=[], metavar="KEY=VALUE",
        help="of submitit's update_parameters, such as timeout_min=600 or gpus_per_node=1",
    )  # fmt: skip
    args = without_usage(parser).parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {args.jobs}")
    if args.blocks and args.command not in ("run", "table"):
        parser.error(f"{args.command} takes no block, got {' '.join(args.blocks)}")
    if (args.partition or args.cluster_option) and not args.cluster:
        parser.error("--partition and --cluster-option need --cluster")
    for option in args.cluster_option:
        if "=" not in option:
            parser.error(f"--cluster-option takes KEY=VALUE, got {option}")
    return args


def run(plan, args):
    with runner.only_runner(plan) as lock:
        if args.cluster:
            options = {"slurm_partition": args.partition} if args.partition else {}
            for text in args.cluster_option:
                key, _, value = text.partition("=")
                options[key] = int(value) if value.isdigit() else value
            launcher = runner.Cluster(args.cluster, plan.output / "submitit", options)
        else:
            launcher = runner.Local(lock)
        study = runner.Runner(plan, launcher, args.jobs, args.dirty, args.blocks)
        if args.retry_failed:
            study.retry_failed()
        study.run()
    status(plan, args)


def status(plan, args):
    rows, _ = results(plan)
    now = {"jobs": args.jobs, "running": []}
    if runner.is_running(plan) and (plan.output / "running.json").exists():
        now = json.loads((plan.output / "running.json").read_text())
    print(tables.status_table(plan, rows, now["running"]))
    for name in now["running"]:
        print(f"running: {name}, iteration {runner.progress(plan, name)}")
    if old := runner.outdated(plan, rows):
        print(
            f"{len(old)} results are of another version of the plan, or another learning rate than is the best now: "
            f"{', '.join(old[:5])} ..."
        )
    if old := sorted(runner.superseded(rows)):
        print(
            f"{len(old)} results start from weights that have been trained again since, `run` repeats them: "
            f"{', '.join(old[:5])} ..."
        )
    paused = ", paused" if (plan.output / "PAUSE").exists() else ""
    left = runner.remaining(plan, rows, now["jobs"])
    print(f"left with {now['jobs']} at a time: {left}{paused}")


def table(plan, args):
    rows, _ = results(plan)
    for name in args.blocks or plan.blocks_names:
        block = plan.block(name)
        parts = [
            f(block, rows) for f in (tables.block_table, tables.difference_table, tables.failures)
        ]
        print("\n\n".join([f"## {block.title}", *filter(None, parts)]) + "\n")


def write_document(plan, args):
    document.write_document(plan, *results(plan))
    print(f"{plan.document} is written")


def pause(plan, args):
    plan.output.mkdir(parents=True, exist_ok=True)
    (plan.output / "PAUSE").touch()


def resume(plan, args):
    (plan.output / "PAUSE").unlink(missing_ok=True)


def results(plan):
    """Rows by run, and learning curves by run."""
    runs, curves = runner.open_results(plan)
    points = {}
    for point in curves.rows:
        points.setdefault(point["run"], []).append(point)
    return {row["run"]: row for row in runs.rows}, points


COMMANDS = {
    "run": run,
    "status": status,
    "table": table,
    "document": write_document,
    "pause": pause,
    "resume": resume,
}


def main(argv=None):
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with errors_in_one_line():
            COMMANDS[args.command](load_plan(args.plan), args)
    except KeyboardInterrupt:
        print("study.py: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
