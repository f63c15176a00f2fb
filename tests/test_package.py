"""The package as it is imported and installed."""

import ast
import re
import subprocess
import sys

import pytest

from .helpers import ROOT

PACKAGE = ROOT / "mabn_d2"
BELOW_THE_LINE = ("layers", "ops", "statistics", "surgery", "training", "utils")
WITHOUT_DETECTRON2 = "import sys; sys.modules['detectron2'] = sys.modules['fvcore'] = None; "


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def imported_modules(path):
    """Absolute names of all modules that a file imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *filter(None, [node.module])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def test_without_detectron2_the_layers_train_and_the_import_is_silent():
    code = (
        "import torch, mabn_d2\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), mabn_d2.MABN2d(4))\n"
        "mabn_d2.centralize(model)\n"
        "model(torch.rand(2, 3, 5, 5)).sum().backward()\n"
        "assert len(mabn_d2.fold(model).state_dict()) == 2\n"
        "import mabn_d2.surgery, mabn_d2.training, mabn_d2.ops\n"
    )
    done = run(WITHOUT_DETECTRON2 + code)
    assert done.returncode == 0 and not done.stdout, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "from mabn_d2 import add_mabn_config",
        "import mabn_d2; mabn_d2.install()",
        "from mabn_d2.engine import Trainer",
        "import mabn_d2.checkpoint",
        "import mabn_d2.plugin.config",
    ],
)
def test_without_detectron2_what_needs_it_says_how_to_install_it(code):
    done = run(WITHOUT_DETECTRON2 + code)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: This part of mabn_d2 needs Detectron2")
    assert "pip install" in last and "sal-detectron2==0.7.2" in last


@pytest.mark.parametrize("room", BELOW_THE_LINE)
def test_below_the_line_nothing_imports_detectron2_or_what_needs_it(room):
    above = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {*BELOW_THE_LINE}
    forbidden = ("detectron2", "fvcore", *(f"mabn_d2.{name}" for name in above))
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            assert not f"{name}.".startswith(tuple(f"{f}." for f in forbidden)), (path, name)


# ---- metadata ------------------------------------------------------------------------------------

# Distributions whose modules have another name.
MODULES = {"opencv-python": "cv2", "Pillow": "PIL", "PyYAML": "yaml"}
# Asked for where it is needed: Detectron2 itself, what only pictures are drawn with, what exported
# models run with, what submits jobs, and what comes with PyTorch for a GPU.
OPTIONAL = {"detectron2", "matplotlib", "onnxruntime", "submitit", "triton"}


def declared(text, opening):
    """The quoted entries of a list in pyproject.toml, without what is after the name."""
    block = text.partition(opening)[2].partition("\n]")[0]
    return [
        re.match(r"[\w-]+", entry).group() for entry in re.findall(r'^    "(.+)",', block, re.M)
    ]


def test_every_package_that_is_imported_is_declared_and_the_other_way_round():
    pyproject = (ROOT / "pyproject.toml").read_text()
    dependencies = {MODULES.get(n, n) for n in declared(pyproject, "\ndependencies = [")}
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    imported = {name.partition(".")[0] for path in files for name in imported_modules(path)}
    assert imported - sys.stdlib_module_names - OPTIONAL - {"mabn_d2"} == dependencies


def test_the_least_versions_that_are_declared_are_those_of_the_compiled_stack():
    pyproject = (ROOT / "pyproject.toml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    lock = (ROOT / "requirements.lock").read_text()
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', pyproject)
    (torch,) = re.findall(r'    "torch>=([\d.]+)"', pyproject)
    assert f"find_python,{python}," in makefile
    assert re.search(rf"^torch=={re.escape(torch)}[.\d]*$", lock, re.M)


def test_no_test_imports_another():
    for path in ROOT.glob("tests/**/test_*.py"):
        for name in imported_modules(path):
            assert not re.search(r"(^|\.)test_", name), (path, name)


def test_the_readmes_name_every_tool_and_every_room():
    tools = (ROOT / "tools" / "README.md").read_text()
    assert [
        path.name for path in (ROOT / "tools").glob("*.py") if f"]({path.name})" not in tools
    ] == []
    layout = (ROOT / "README.md").read_text().partition("## Layout")[2]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"`mabn_d2/(\w+)/`", layout)) == rooms
