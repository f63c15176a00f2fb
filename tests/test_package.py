"""The package as it is imported and installed."""

import subprocess
import sys
from pathlib import Path

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
