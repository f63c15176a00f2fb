"""
Installs a wheel of the package into a fresh environment and uses it there, outside the checkout.

The environment takes the other packages, which are gigabytes, from this interpreter's by a path file.
A folder that is added so gives its modules, but its own path files are not read: the checkout, which
is installed here by one, stays unseen.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTANT = "configs/quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn_instant.yaml"
IMPORTS = """
import importlib.resources
import mabn_d2
from detectron2.layers import get_norm

assert mabn_d2.__file__.startswith({environment!r}), mabn_d2.__file__
assert importlib.resources.files(mabn_d2).joinpath("py.typed").is_file()
assert type(get_norm("MABN", 8)) is mabn_d2.MABN2d
"""


def main(wheel: Path, folder: Path) -> None:
    environment, work = folder / "environment", folder / "work"
    venv.create(environment, with_pip=True)
    # The tools and configs without the package beside them.
    for name in ("tools", "configs"):
        shutil.copytree(ROOT / name, work / name)

    def run(*arguments: object) -> None:
        # -I: neither PYTHONPATH nor the working folder is searched.
        command = [environment / "bin" / "python", "-I", *map(str, arguments)]
        variables = {**os.environ, "DETECTRON2_DATASETS": "datasets"}
        done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{arguments} failed:\n{done.stdout}{done.stderr}")

    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel.resolve())
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))

    run("-c", IMPORTS.format(environment=str(environment)))
    for tool in sorted(work.glob("tools/*.py")):
        run(tool, "--help")
    run("tools/make_synthetic_coco.py", "datasets", "--train", 4, "--val", 2, "--size", 64)
    run(
        "tools/train_net.py", "--config-file", INSTANT, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", "output"
    )
    run("tools/report.py", "output")
    print(f"{wheel.name}: imported, and trained from, in an environment of its own")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1]), Path(temporary).resolve())
