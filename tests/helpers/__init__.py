"""What several test files need. Test files import from here and never from one another."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository, whatever the working folder is
CONFIGS = ROOT / "configs"
# A model that is built in a moment and trained for a few iterations.
INSTANT = CONFIGS / "quick_schedules" / "shapes_mask_rcnn_R_18_FPN_mabn_instant.yaml"


def load_tool(name):
    """tools/`name`.py as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
