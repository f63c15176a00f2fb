"""Moving averages of gradients under a loss scale."""

from torch import nn

from ..layers import MABN2d


def follow_grad_scaler(model: nn.Module, grad_scaler) -> None:
    """
    Tells every MABN of a model by which scaler the loss is multiplied before `backward()`.

    Under mixed precision the gradients arrive multiplied by a loss scale that changes. With this one
    line after the scaler is made, the ψ buffers stay free of it. Detectron2's `AMPTrainer` does it
    by itself.

    Args:
        model: any module; norms that are added later are not told.
        grad_scaler: a `torch.amp.GradScaler`, or None for a loss that is not scaled.
    """
    for module in model.modules():
        if isinstance(module, MABN2d):
            module.grad_scaler = grad_scaler
