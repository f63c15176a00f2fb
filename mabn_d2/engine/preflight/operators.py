"""Detectron2's compiled operators, which an installation may lack."""

import importlib.util

from detectron2.config import CfgNode

from .values import leaves

# Values that ask for boxes with an angle.
_ROTATED = ("RotatedAnchorGenerator", "RRPN", "RROIHeads", "ROIAlignRotated")


def check_compiled_operators(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: the config asks for deformable convolution or rotated boxes, and this Detectron2 is
            its Python code alone.
    """
    if importlib.util.find_spec("detectron2._C") is not None:
        return
    for key, value in leaves(cfg):
        if value in _ROTATED or (key.endswith(".DEFORM_ON_PER_STAGE") and any(value)):
            raise ValueError(
                f"{key} {value} needs Detectron2's compiled operators (detectron2._C), and this "
                "installation has none"
            )
