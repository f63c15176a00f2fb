"""The package as it is imported and installed."""
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_without_detectron2_the_import_says_so_and_how_to_install_it():
    code = "import sys; sys.modules['detectron2'] = None; import mabn_d2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: mabn_d2 needs Detectron2")
    assert "pip install" in last and "sal-detectron2==0.7.2" in last


def test_the_layers_do_not_import_detectron2():
    for path in (ROOT / "mabn_d2" / "layers").glob("*.py"):
        assert "import detectron2" not in path.read_text()
        assert "from detectron2" not in path.read_text()


def test_every_experiment_states_only_its_difference_from_an_existing_base():
    configs = sorted((ROOT / "configs").glob("*/*.yaml"))
    assert len(configs) >= 7
    for path in configs:
        content = yaml.safe_load(path.read_text())
        assert (path.parent / content["_BASE_"]).exists()


def test_the_papers_experiments_differ_in_norm_and_start_alone():
    experiments = {}
    for path in (ROOT / "configs" / "COCO-InstanceSegmentation").glob("*.yaml"):
        model = yaml.safe_load(path.read_text())["MODEL"]
        norms = {value["NORM"] for key, value in model.items() if key != "WEIGHTS"}
        assert len(norms) == 1
        assert set(model) == {"WEIGHTS", "RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"}
        experiments[path.stem] = (norms.pop(), bool(model["WEIGHTS"]))
    assert experiments == {
        "scratch_mask_rcnn_R_50_FPN_2x_bn": ("BN", False),
        "scratch_mask_rcnn_R_50_FPN_2x_syncbn": ("SyncBN", False),
        "scratch_mask_rcnn_R_50_FPN_2x_mabn": ("MABN", False),
        "mask_rcnn_R_50_FPN_2x_syncbn": ("SyncBN", True),
        "mask_rcnn_R_50_FPN_2x_mabn": ("MABN", True),
    }
