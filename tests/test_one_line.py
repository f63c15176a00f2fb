"""The tools that cannot start say so in one line, and leave nothing behind."""

import os
import runpy
import subprocess
import sys

import pytest

from mabn_d2.data import make_synthetic_coco, register_shapes
from mabn_d2.utils.command_line import one_line

from .helpers import CONFIGS, INSTANT, ROOT

TOOLS = ROOT / "tools"
LAZY = CONFIGS / "FashionMNIST" / "resnet18_mabn_2.py"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    make_synthetic_coco(folder, layout="shapes", train=2, val=2, size=64)
    return folder


@pytest.fixture
def refuse(datasets, tmp_path, monkeypatch, capsys):
    """Runs a tool in this process, in an empty folder, and returns its one line."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    register_shapes(str(datasets))

    def refuse(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOLS / tool), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        printed = capsys.readouterr()
        assert exit.value.code == 2
        assert printed.out == "" and printed.err.count("\n") == 1
        assert printed.err.startswith(f"{tool}: error: ")
        assert not list(folder.iterdir())
        return printed.err

    return refuse


@pytest.fixture
def files(tmp_path):
    """Files that are no config, by name."""
    contents = {
        "list.yaml": "- 1",
        "syntax.yaml": "MODEL: [1",
        "unknown.yaml": "MODEL: {NO_SUCH: 1}",
        "empty_group.yaml": "MODEL:",
        "base.yaml": "_BASE_: missing.yaml",
        "picture.yaml": "\x00\x01\xff",
        "syntax.py": "model = (",
        "raises.py": "raise RuntimeError('two\\nlines')",
        "nothing.py": "",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--num-gpus", "two"], "--num-gpus"),
        (["--num-gpus", "0"], "--num-gpus must be a positive integer"),
        (["--machine-rank", "3"], "--machine-rank"),
        (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER", "None"], "SOLVER.MAX_ITER must be a positive integer, got None"),
        (["SOLVER.MAX_ITERS", "3"], "SOLVER.MAX_ITERS"),
        (["SOLVER.MAX_ITER.MORE", "3"], "TypeError"),
        (["STATISTICS.PERIOD", "0"], "STATISTICS.PERIOD must be a positive integer, got 0"),
        (
            ["STATISTICS.ENABLED", "True", "STATISTICS.LAYERS", "['stem']"],
            "STATISTICS.LAYERS: No norm of the model matches 'stem'; its norms are backbone",
        ),
        (["MODEL", "{}"], "MODEL"),
        (["MODEL.RESNETS", "None"], "MODEL.RESNETS"),
        (["MODEL.WEIGHTS", "None"], "MODEL.WEIGHTS must be a string, got None"),
        (["MODEL.WEIGHTS", str(INSTANT)], "is no checkpoint"),
        (["MODEL.BACKBONE.NAME", "resnet"], "MODEL.BACKBONE.NAME"),
        (["MODEL.RESNETS.DEPTH", "51"], "The model of MODEL cannot be built: KeyError: 51"),
        (["OUTPUT_DIR", f"{INSTANT}/output"], "OUTPUT_DIR"),
    ],
    ids=" ".join,
)
def test_train_net_refuses_a_wrong_option_in_one_line(refuse, arguments, word):
    assert word in refuse("train_net.py", "--config-file", INSTANT, *arguments)


@pytest.mark.parametrize(
    "name", ["", "missing.yaml", ".", "list.yaml", "syntax.yaml", "unknown.yaml",
             "empty_group.yaml", "base.yaml", "picture.yaml"],
)  # fmt: skip
def test_train_net_refuses_what_is_no_config_in_one_line(refuse, files, name):
    refuse("train_net.py", "--config-file", files / name if name else "")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--num-gpus", "0"], "--num-gpus must be a positive integer"),
        (["train.max_iter"], "train.max_iter: an override has the form key=value"),
        (["train.max_iter=many"], "train.max_iter must be a positive integer"),
        (["train.max_iter=2"], "lr_multiplier with train.max_iter 2"),
        (["train.max_itr=2"], "no key train.max_itr"),
        (["train=2"], "train must be a group of keys"),
        (["model=2"], "model must be a group of keys"),
        (["model.num_classes=-1"], "model cannot be built"),
        (["model._target_=no.such.Model"], "model cannot be built"),
        (["train.init_checkpoint=."], "train.init_checkpoint: . is a folder"),
        (["train.output_dir=3"], "train.output_dir must be a non-empty string, got 3"),
    ],
    ids=" ".join,
)
def test_lazyconfig_train_net_refuses_a_wrong_option_in_one_line(refuse, arguments, word):
    assert word in refuse("lazyconfig_train_net.py", "--config-file", LAZY, *arguments)


@pytest.mark.parametrize("name", ["missing.py", ".", "syntax.py", "raises.py", "nothing.py"])
def test_lazyconfig_train_net_refuses_what_is_no_config_in_one_line(refuse, files, name):
    refuse("lazyconfig_train_net.py", "--config-file", files / name)


@pytest.mark.parametrize(
    "command",
    [
        "convert_weights.py",
        "convert_weights.py missing.pth new.pth --from torchvision",
        "convert_weights.py / new.pth --from torchvision",
        f"convert_weights.py {INSTANT} new.pth --from torchvision",
        "report.py",
        "report.py missing",
        f"report.py {INSTANT}",
        "report.py . --images many",
        "make_synthetic_coco.py",
        "make_synthetic_coco.py new --train many",
        "make_synthetic_coco.py new --train -1",
        f"make_synthetic_coco.py {INSTANT}/new",
        "benchmark_norm.py --device abacus",
        "benchmark_norm.py --runs 0",
    ],
)
def test_the_other_tools_refuse_a_wrong_option_in_one_line(refuse, command):
    refuse(*command.split())


@pytest.mark.parametrize(
    "tool, arguments, word",
    [
        ("train_net.py", ["--config-file", INSTANT, "TEST.AUG.FLIP", "None"], "TEST.AUG.FLIP"),
        ("lazyconfig_train_net.py", ["--config-file", LAZY, "train.seed=x"], "train.seed"),
    ],
)
def test_as_a_program_a_tool_ends_with_the_same_line(datasets, tmp_path, tool, arguments, word):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOLS / tool), *map(str, arguments)],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{tool}: error: ") and word in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_traceback_is_there_for_who_wants_it(refuse, monkeypatch):
    monkeypatch.setenv("MABN_D2_TRACEBACK", "1")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS"):
        refuse("train_net.py", "--config-file", INSTANT, "MODEL.WEIGHTS", "None")


def test_an_error_is_told_in_one_line_of_readable_length():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError("a\nkey")) == "KeyError: a key"
    assert one_line(TypeError()) == "TypeError"
    assert len(one_line(ValueError("x" * 5000))) < 700
