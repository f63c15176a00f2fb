"""Models whose norms have statistics and parameters as after a training."""

import torch


@torch.no_grad()
def settle(model, seed=0, inputs=None):
    """
    Gives every norm of a model random parameters and statistics, those of the inputs if there are any.

    Returns the model in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor, low, high):
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    for module in model.modules():
        if getattr(module, "running_var", None) is None and not hasattr(module, "_affine"):
            continue
        for name, low, high in [
            ("running_mean", -0.3, 0.3),
            ("running_var", 0.5, 1.5),
            ("weight", 0.5, 1.5),
            ("bias", -0.3, 0.3),
        ]:
            if getattr(module, name, None) is not None:
                fill(getattr(module, name), low, high)
    for module in model.modules():
        if hasattr(module, "kernel_mean"):
            fill(module.kernel_mean, -0.1, 0.1)
    model.eval()
    if inputs is not None:
        norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None]
        handles = [norm.register_forward_pre_hook(measure) for norm in norms]
        model(inputs)
        for handle in handles:
            handle.remove()
    return model


def measure(norm, args):
    """
    Makes a norm's output of order 1 on its input, and keeps its mean.

    The variance is the second moment: an untrained network tells images apart so little that dividing by
    their variance magnifies rounding from layer to layer.
    """
    x = args[0].detach()
    if x.numel() > 0:
        norm.running_var.copy_(x.square().mean((0, 2, 3)) + 1e-3)


def relative_error(got, expected):
    """The largest difference of two tensors relative to the largest value."""
    if expected.numel() == 0:
        return 0.0
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
