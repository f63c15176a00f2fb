"""Weights of torchvision's ResNets."""

from typing import Any

from .weights import (
    FOREIGN_NORM_NOTE,
    Weights,
    found,
    is_resnet,
    merge,
    rename,
    resnet_config,
    resnet_name,
    split,
    torchvision_config,
)


def convert_torchvision(checkpoint: dict[str, Any], path: str) -> Weights:
    """
    Weights of a ResNet with torchvision's names, as a backbone.

    The norms' tensors stay what they are: BN's, or those of :class:`MABN2d` where such a model was
    trained with the layers of this package.

    Args:
        checkpoint: as from :func:`read_checkpoint`.
        path: for messages.

    Raises:
        ValueError: the names are not those of a ResNet.
    """
    state_dict, others = split(checkpoint, ("state_dict", "model"))
    if not is_resnet(state_dict):
        raise ValueError(
            f"{path} is not a ResNet of torchvision: {found(state_dict or checkpoint)}, accepted "
            "are conv1.weight, bn1.weight, layer1.0.conv1.weight, ..."
        )
    if "bn1.iters" in state_dict:
        raise ValueError(
            f"{path} is not a ResNet of torchvision: its norms are those of the MABN release "
            "(bn1.iters), accepted with --from mabn-release"
        )
    state_dict, unknown = rename(state_dict, resnet_name)
    weights = Weights(state_dict, "torchvision", True, others + unknown, {}, [])
    resnet = resnet_config(state_dict, weights.norm, stride_in_1x1=False)
    merge(weights.config, torchvision_config(), resnet)
    if weights.norm == "BN":
        weights.notes.append(FOREIGN_NORM_NOTE)
    return weights
