"""Weights of torchvision's ResNets."""

from typing import Any

from .resnet import is_resnet, resnet_config, resnet_name
from .weights import (
    FOREIGN_NORM_NOTE,
    Weights,
    check_all_known,
    found,
    merge,
    pixels,
    rename,
    split,
)

_SOURCE = "torchvision's ResNets"
_ACCEPTED = "conv1.weight, bn1.weight, layer1.0.conv1.weight, ..., fc.bias"


def convert_torchvision(checkpoint: dict[str, Any], path: str) -> Weights:
    """
    Weights of a ResNet with torchvision's names, as a backbone.

    The norms' tensors stay what they are: BN's, or those of :class:`MABN2d` where such a model was
    trained with the layers of this package.

    Args:
        checkpoint: as from :func:`read_checkpoint`.
        path: for messages.

    Raises:
        ValueError: a name is not that of a ResNet.
    """
    state_dict, others = split(checkpoint, ("state_dict", "model"))
    if not is_resnet(state_dict):
        raise ValueError(
            f"{path} is not of {_SOURCE}: {found(state_dict or checkpoint)}, accepted are {_ACCEPTED}"
        )
    if "bn1.iters" in state_dict:
        raise ValueError(
            f"{path} is not of {_SOURCE}: its norms are those of the MABN release "
            "(bn1.iters), accepted with --from mabn-release"
        )
    state_dict, unknown = rename(state_dict, resnet_name)
    check_all_known(unknown, path, _SOURCE, _ACCEPTED)
    weights = Weights(state_dict, "torchvision", True, others, {}, [])
    resnet = resnet_config(state_dict, weights.norm, stride_in_1x1=False)
    merge(weights.config, torchvision_config(), resnet)
    if weights.norm == "BN":
        weights.notes.append(FOREIGN_NORM_NOTE)
    return weights


def torchvision_config() -> dict[str, Any]:
    """The pixels and the stride of torchvision's models."""
    config = pixels("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    merge(config, {"MODEL": {"RESNETS": {"STRIDE_IN_1X1": False}}})
    return config
