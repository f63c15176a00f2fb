"""
Starts a program on the dry GPU.

    python -m tests.dry_gpu run [--compute | --compute-no-maps] SCRIPT [ARGS]
    python -m tests.dry_gpu run [--compute | --compute-no-maps] -m MODULE [ARGS]
    python -m tests.dry_gpu test [PYTEST'S OPTIONS]

With --compute the operators' results are computed on the CPU, with --compute-no-maps only those on tensors of
at most three dimensions: a detector then costs little, and chooses among its boxes all the same. `test` runs this folder's tests; where there can
be no dry GPU it says so and skips them, but fails if the environment has CI=true.
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from . import compute
from .library import HERE, PATH_VARIABLE, Unavailable, build, set_answers

ROOT = HERE.parents[1]
_COMPUTE = ("--compute", "--compute-no-maps")


def run(arguments: list[str]) -> NoReturn:
    """Replaces this process by one that runs a script or module on the dry GPU."""
    library = build()
    environment = {**os.environ, PATH_VARIABLE: str(library)}
    for variable, first in [
        ("LD_PRELOAD", library),
        ("LD_LIBRARY_PATH", library.parent),
        ("PYTHONPATH", ROOT),
    ]:
        environment[variable] = ":".join(filter(None, [str(first), environment.get(variable)]))
    # Triton compiles its launchers against the driver that it finds here.
    environment["TRITON_LIBCUDA_PATH"] = str(library.parent)
    environment["TRITON_CACHE_DIR"] = str(library.parent.parent / "triton")
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, "-m", "tests.dry_gpu", "child", *arguments], environment
    )


def run_here(arguments: list[str]) -> None:
    """Runs a script or module in this process, which is on the dry GPU."""
    set_answers(True)
    results = contextlib.nullcontext()
    if arguments[0] in _COMPUTE:
        results, arguments = compute(maps=arguments[0] == "--compute"), arguments[1:]
    with results:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")


def test(arguments: list[str]) -> NoReturn:
    """Runs this folder's tests on the dry GPU."""
    try:
        run(["-m", "pytest", str(HERE), *arguments])
    except Unavailable as reason:
        print(f"{reason}: the tests of the code for CUDA are skipped")
        sys.exit(os.environ.get("CI") == "true")


def main(arguments: list[str]) -> None:
    command, *rest = arguments or ["help"]
    if command == "test":
        test(rest)
    elif command == "child":
        run_here(rest)
    elif command == "run" and rest[-1:] not in ([], ["-m"], *([flag] for flag in _COMPUTE)):
        try:
            run(rest)
        except Unavailable as reason:
            sys.exit(str(reason))
    else:
        sys.exit(__doc__.strip())


if __name__ == "__main__":
    main(sys.argv[1:])
