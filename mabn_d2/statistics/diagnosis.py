"""
How noisy the batch statistics of a model's norms are at fixed weights, on its own data.

The four statistics are those of Towards Stabilizing Batch Statistics in Backward Propagation of Batch
Normalization, ICLR 2020, section 3, https://arxiv.org/abs/2001.06838
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import mode
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers import MABN2d
from ..layers.norm import in_backward
from ..layers.steady_state import start_in_steady_state
from ..ops import affine_map, channel_mean_var, gradient_sums
from ..training.population import gathers_statistics, population_statistics
from ..training.recording import no_recording
from .moments import clipped_share, moving_average_and_r
from .recorder import can_be_recorded

QUANTITIES = ("mean", "var", "grad_mean", "grad_dot")


class LayerDiagnosis(NamedTuple):
    """
    The noise of the statistics that BN takes, or would take, in the place of one norm.

    With μ, σ² the moments of the layer's input over all images that were run, Y = (x - μ) / sqrt(σ² + ε)
    and γ·d = ∂L/∂Y, the errors of a batch B are, as root mean squares over batches and channels:

        mean       (μ_B - μ) / sqrt(σ² + ε)
        var        (σ²_B - σ²) / (σ² + ε)
        grad_mean  (g_B - g) / rms(∂L/∂Y)          g_B = mean of ∂L/∂Y in the batch
        grad_dot   (Ψ_B - Ψ) / rms(∂L/∂Y)          Ψ_B = mean of Y·∂L/∂Y

    rms(∂L/∂Y) is one number per layer, over all values of all channels.

    Attributes:
        layer: the module's name in the model.
        norm: its class.
        images: in a normalization batch.
        values: of a channel in a normalization batch, on average.
        squared_errors: of each step and quantity, shape (steps, 4); nan where there is none.
        squared_common: the part of them that the two halves of an image have in common, likewise: images differ.
            nan where there are no halves.
        between: of each quantity, this part as a share. The rest is between parts of an image.
        train_eval: root mean square of the difference between the outputs of training and of evaluation with
            population statistics, for the same input, relative to that of the output less β.
        clipped: the share of MABN's channels whose r is at its bound; None for other norms.
    """

    layer: str
    norm: str
    images: int
    values: float
    squared_errors: torch.Tensor
    squared_common: torch.Tensor
    between: dict[str, float]
    train_eval: float
    clipped: float | None

    @property
    def noise(self) -> dict[str, float]:
        """Of each quantity."""
        return dict(zip(QUANTITIES, self.squared_errors.nanmean(0).sqrt().tolist()))

    @property
    def standard_error(self) -> dict[str, float]:
        """Of the noise, from the differences between steps."""
        squares, mean = self.squared_errors, self.squared_errors.nanmean(0)
        count = squares.isfinite().sum(0)
        variance = (squares - mean).square().nansum(0) / (count * (count - 1))
        return dict(zip(QUANTITIES, (variance.sqrt() / (2 * mean.sqrt())).tolist()))


class Diagnosis(NamedTuple):
    """
    Attributes:
        images: in a step.
        steps: over which the noise was measured.
        loss_train, loss_eval: means over the same steps, the norms normalizing as in training and with
            population statistics.
        layers: in the order of the model; norms that saw nothing are left out.
    """

    images: int
    steps: int
    loss_train: float
    loss_eval: float
    layers: list[LayerDiagnosis]

    @property
    def norm_batch(self) -> int:
        """Images in a normalization batch, of most layers."""
        return mode(layer.images for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not a number is None."""
        layers = [
            {
                "layer": layer.layer,
                "norm": layer.norm,
                "images": layer.images,
                "values": layer.values,
                "noise": _without_nan(layer.noise),
                "standard_error": _without_nan(layer.standard_error),
                "between": _without_nan(layer.between),
                "train_eval": layer.train_eval,
                "clipped": layer.clipped,
            }
            for layer in self.layers
        ]
        return {**self._asdict(), "layers": layers}

    def table(self) -> str:
        """A row for each layer, in Markdown: noise with its standard error, and share from between images."""
        header = ["layer", "norm", "images", "values", *QUANTITIES, "train - eval", "r clipped"]
        rows = [header, ["---"] * len(header)]
        for layer in self.layers:
            noise, error, between = layer.noise, layer.standard_error, layer.between
            cells = [f"{noise[q]:.3f} ± {error[q]:.3f} ({between[q]:.0%})" for q in QUANTITIES]
            clipped = "-" if layer.clipped is None else f"{layer.clipped:.1%}"
            name, *numbers = layer.layer, layer.norm, str(layer.images), f"{layer.values:.0f}"
            cells = [cell.replace(" (nan%)", "").replace("nan ± nan", "-") for cell in cells]
            rows.append([name, *numbers, *cells, f"{layer.train_eval:.3f}", clipped])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if value != value else value for key, value in values.items()}


def total_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """What the model returns for a batch: a loss, or a dictionary of losses, which are added up."""
    losses = model(batch)
    return sum(losses.values()) if isinstance(losses, Mapping) else losses


def split_batch(batch: Any) -> list[Any]:
    """
    A batch as batches of one image.

    Tensors are cut along their first dimension; tuples and dictionaries, and lists that hold a tensor,
    member by member; any other list has an entry for each image.

    Raises:
        ValueError: it is something else, or the members differ in the number of images.
    """
    if isinstance(batch, torch.Tensor) and batch.dim():
        return list(batch.split(1))
    if isinstance(batch, list) and not any(isinstance(entry, torch.Tensor) for entry in batch):
        return [[entry] for entry in batch]
    if isinstance(batch, (tuple, list)):
        parts = [split_batch(member) for member in batch]
    elif isinstance(batch, dict):
        parts = [split_batch(member) for member in batch.values()]
    else:
        raise ValueError(f"A batch that is a {type(batch).__name__} needs a `split` of its own")
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"The members of a batch have {[len(part) for part in parts]} images")
    if isinstance(batch, dict):
        return [dict(zip(batch, image)) for image in zip(*parts)]
    if hasattr(batch, "_fields"):  # a named tuple
        return [type(batch)(*image) for image in zip(*parts)]
    return [type(batch)(image) for image in zip(*parts)]


def diagnose(
    model: nn.Module,
    batches: Iterable,
    steps: int = 100,
    loss: Callable[[nn.Module, Any], torch.Tensor] = total_loss,
    split: Callable[[Any], list[Any]] = split_batch,
) -> Diagnosis:
    """
    Measures the noise of the batch statistics of all norms of a model, which is the same afterwards to the bit.

    In three parts, all with the given weights: half as many steps in training mode give the population
    statistics of the norms; `steps` steps with those, image by image, give the four statistics of each
    batch and of all together; half as many in training mode, whose first half fills the moving averages,
    are compared with evaluation. In the second part a norm is a fixed map, so that one layer's noise is
    not the previous one's, and each image can be run by itself: what a norm sees then is that
    image's, be it a feature map or the regions of a head. The loss of a batch is taken to be the mean
    over its images.

    Norms are BN, SyncBN, MABN, BRN, MBN and GN, and FrozenBN by its buffers. GN, norms in evaluation mode
    and frozen ones are run as they are. A norm that is called several times for an image sees all calls
    as one. MABN, BRN and MBN are taken to be in their steady state. A batch is as many images as the loader
    gives, or a layer's `norm_batch_size`.

    Args:
        model: in training mode.
        batches: of the size to be judged, in random order; if it has a length, it can be gone through
            several times. Batches of another size than the first are left out.
        steps: at least 4.
        loss: of the model and a batch, a tensor of shape (). It must have a gradient.
        split: makes batches of one image of a batch.

    Raises:
        ValueError: the model has no norm, is in evaluation mode or has a BN without running statistics;
            there are too few batches; the loss is not a number.
    """
    norms = _find_norms(model)
    if steps < 4:
        raise ValueError(f"steps must be at least 4, got {steps}")
    if not model.training:
        raise ValueError("The model must be in training mode: call model.train()")
    for name, norm in norms.items():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is None:
            raise ValueError(
                f"{name} has no running statistics, so it has no evaluation to compare"
            )
    stream = _Stream(batches, split)
    gathering = [norm for norm in norms.values() if gathers_statistics(norm)]
    with no_recording(model):
        with torch.no_grad(), population_statistics(model):
            for batch in stream.take(steps // 2):
                loss(model, batch)
        for norm in gathering:
            start_in_steady_state(norm)
        sums = {name: _ImageSums(norm) for name, norm in norms.items()}
        with _evaluating(gathering), _listening(norms, sums):
            for batch in stream.take(steps):
                for image in split(batch):
                    _backward(model, loss(model, image))
                    for layer in sums.values():
                        layer.end_image()
                for layer in sums.values():
                    layer.end_step()
        comparison = _Comparison(model, {n: m for n, m in norms.items() if m in set(gathering)})
        comparison.run(stream, steps // 2, loss)
    layers = [
        layer.diagnose(name, comparison.differences.get(name, 0.0), comparison.clipped.get(name))
        for name, layer in sums.items()
        if layer.has_values
    ]
    return Diagnosis(stream.images, steps, *comparison.losses, layers)


def _find_norms(model: nn.Module) -> dict[str, nn.Module]:
    norms = {
        name: module
        for name, module in model.named_modules()
        if can_be_recorded(module)
        or {"weight", "bias", "running_mean", "running_var"} <= {*module._buffers}
    }
    if not norms:
        raise ValueError("The model has no BN, SyncBN, MABN, BRN, MBN, GN or FrozenBN")
    return norms


class _Stream:
    """Batches of one size, over and over where they have an end and a length."""

    def __init__(self, batches: Iterable, split: Callable):
        self._batches, self._split, self.images = batches, split, 0
        self._iterator = self._endless() if hasattr(batches, "__len__") else iter(batches)

    def _endless(self) -> Iterator:
        while True:
            count = 0
            for count, batch in enumerate(self._batches, start=1):  # noqa: B007
                yield batch
            if not count:
                return

    def take(self, count: int) -> Iterator:
        taken = skipped = 0
        while taken < count:
            batch = next(self._iterator, None)
            if batch is None or skipped > count:
                raise ValueError(f"{count} batches of the same size are needed, got {taken}")
            size = len(self._split(batch))
            self.images = self.images or size
            if size == self.images:
                taken += 1
                yield batch
            else:
                skipped += 1


@contextlib.contextmanager
def _evaluating(norms: Iterable[nn.Module]) -> Iterator[None]:
    norms = list(norms)
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


@contextlib.contextmanager
def _listening(norms: Mapping[str, nn.Module], listeners: Mapping[str, Callable]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_hook(listeners[name]).remove)
        yield


def _backward(model: nn.Module, loss: torch.Tensor) -> None:
    """Runs the backward pass for what listens to it; the gradients of the parameters are dropped."""
    if not (loss.dim() == 0 and loss.isfinite()):
        raise ValueError(f"The loss must be one finite number, got {loss.detach()}")
    if not loss.requires_grad:
        raise ValueError("The loss has no gradient: no parameter of the model requires one")
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, parameters, allow_unused=True)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every other sample; of one sample the left and the right half, or upper and lower."""
    if len(x) > 1:
        return x[::2], x[1::2]
    dim = 3 if x.shape[3] > 1 else 2
    size = x.shape[dim] // 2
    return x.narrow(dim, 0, x.shape[dim] - size), x.narrow(dim, x.shape[dim] - size, size)


class _ImageSums:
    """
    Sums over the halves of the images that a norm sees, from which the statistics of any batch follow.

    Of each half and channel n, Σ(x - s), Σ(x - s)², Σd, Σd·(x - s) and Σd²; s is a constant near the mean.
    """

    def __init__(self, norm: nn.Module):
        self.norm = norm
        self.shift: torch.Tensor | None = None
        self._image: torch.Tensor | None = None
        self._images: list[torch.Tensor | None] = []
        self._steps: list[torch.Tensor | None] = []  # each of shape (images, 2, 6, C)

    def __call__(self, norm: nn.Module, args: tuple, out: torch.Tensor) -> None:
        x = args[0].detach()
        if x.dim() != 4 or not x.numel() or in_backward():  # activation checkpointing
            return
        for half, part in enumerate(_halves(x)):
            if part.numel():
                self._add_forward(half, part.contiguous())
        if out.requires_grad:
            out.register_hook(lambda d: self._add_backward(d, x))

    def _add_forward(self, half: int, x: torch.Tensor) -> None:
        count, (mean, var) = _count(x), _moments(x)
        if self.shift is None:
            self.shift = mean
            self._dtype = torch.promote_types(x.dtype, torch.float32)
        if self._image is None:
            self._image = torch.zeros(2, 6, len(mean), dtype=torch.float64)
        mean = mean - self.shift
        self._image[half, 0] += count
        self._image[half, 1] += count * mean
        self._image[half, 2] += count * (var + mean.square())

    @torch.no_grad()
    def _add_backward(self, d: torch.Tensor, x: torch.Tensor) -> None:
        shift = self.shift.to(x.device, self._dtype)
        for half, (d_part, x_part) in enumerate(zip(_halves(d), _halves(x))):
            if not d_part.numel():
                continue
            d_part, x_part = d_part.contiguous(), x_part.contiguous()
            count, (mean, var) = _count(d_part), _moments(d_part)
            dot, _ = gradient_sums(d_part, x_part, shift)
            self._image[half, 3] += count * mean
            self._image[half, 4] += dot.double().cpu()
            self._image[half, 5] += count * (var + mean.square())

    def end_image(self) -> None:
        self._images.append(self._image)
        self._image = None

    def end_step(self) -> None:
        images, self._images = self._images, []
        image_sums = _filled(images)
        self._steps.append(None if image_sums is None else image_sums.to(self._dtype))

    @property
    def has_values(self) -> bool:
        return any(step is not None for step in self._steps)

    def diagnose(self, name: str, train_eval: float, clipped: float | None) -> LayerDiagnosis:
        steps = _filled(self._steps).double()  # (steps, images, 2, 6, C)
        has_seen = torch.tensor([step is not None for step in self._steps])
        size = min(getattr(self.norm, "norm_batch_size", 0) or steps.shape[1], steps.shape[1])
        units = _Units(self.norm, steps.sum((0, 1, 2)))
        of_image = steps.sum(2)
        starts = range(0, steps.shape[1], size)
        batches = torch.stack([of_image[:, i : i + size].sum(1) for i in starts], 1)
        squared = units.errors(batches, own_mean=True).square().nanmean((1, 3))  # (steps, 4)
        count = int(has_seen.sum()) * len(starts)
        squared *= count / max(count - 1, 1)
        common, share = _common_part(units, steps, size)
        return LayerDiagnosis(
            name, type(self.norm).__name__, size, batches[has_seen, :, 0, 0].mean().item(), squared, common,
            dict(zip(QUANTITIES, share.tolist())), train_eval, clipped,
        )  # fmt: skip


def _filled(sums: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The sums of all, with zeros where nothing was seen; None if that is everywhere."""
    seen = next((entry for entry in sums if entry is not None), None)
    if seen is None:
        return None
    return torch.stack([torch.zeros_like(seen) if entry is None else entry for entry in sums])


class _Units:
    """What the errors of statistics are relative to: the statistics and sizes of the population."""

    def __init__(self, norm: nn.Module, sums: torch.Tensor):
        """
        Args:
            sums: of the population, shape (6, C).
        """
        weight = 1.0 if norm.weight is None else norm.weight.detach().double().cpu()
        n = sums[0]
        self.weight, self.mean = weight, sums[1] / n
        self.var = sums[2] / n - self.mean.square()
        self.std = (self.var + norm.eps).sqrt()
        self.rms = (weight * weight * sums[5] / n).mean().sqrt()  # nan without a gradient
        self.rms = self.rms if self.rms > 0 else self.rms * torch.nan
        self.statistics = self._statistics(sums, own_mean=False)

    def _statistics(self, sums: torch.Tensor, own_mean: bool) -> torch.Tensor:
        """Mean and variance in σ and σ², g and Ψ in rms(∂L/∂Y): (..., 6, C) -> (..., 4, C)."""
        n, x, xx, d, dx, _ = sums.unbind(-2)  # n = 0 gives nan
        deviation = x / n - self.mean
        var = xx / n - 2 * self.mean * x / n + self.mean.square()  # about the population's mean
        if own_mean:
            var = var - deviation.square()
        grad = self.weight * d / n
        dot = self.weight * (dx - self.mean * d) / n / self.std
        rms = self.rms
        return torch.stack(
            [deviation / self.std, var / self.std.square(), grad / rms, dot / rms], -2
        )

    def errors(self, sums: torch.Tensor, own_mean: bool) -> torch.Tensor:
        """
        Args:
            own_mean: whether a variance is about its batch's mean, else about the population's.
        """
        return self._statistics(sums, own_mean) - self.statistics


def _common_part(
    units: _Units, steps: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the two halves of an image have in common of the squared errors.

    Args:
        steps: sums of shape (steps, images, 2, 6, C).
        size: images of a normalization batch.

    Returns:
        that part of a batch's squared error, shape (steps, 4), and its share, shape (4,).
    """
    has_both = (steps[:, :, :, 0, 0] > 0).all(2)[:, :, None, None, None]
    errors = units.errors(steps, own_mean=False).where(has_both, torch.nan)
    first, second = (errors - errors.nanmean((0, 1))).unbind(2)  # (steps, images, 4, C)
    common = (first * second).nanmean(3)
    total = ((first + second) / 2).square().nanmean((0, 1, 3))
    share = (common.nanmean((0, 1)) / total).clamp(0, 1)
    return common.nanmean(1) / size, share


def _count(x: torch.Tensor) -> int:
    return x.numel() // x.shape[1]


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel, float64 on the CPU."""
    mean, var = channel_mean_var(x, torch.promote_types(x.dtype, torch.float32))
    return mean.double().cpu(), var.double().cpu()


class _Comparison:
    """Training's outputs and losses against those of evaluation with population statistics."""

    def __init__(self, model: nn.Module, norms: Mapping[str, nn.Module]):
        """
        Args:
            norms: that gather statistics; what they hold now are those of the population.
        """
        self._model, self._norms = model, norms
        self._population = {
            name: (norm.running_mean.clone(), norm.running_var.clone())
            for name, norm in norms.items()
        }
        self.losses = (torch.nan, torch.nan)
        self.differences: dict[str, float] = {}
        self.clipped: dict[str, float] = {}

    @torch.no_grad()
    def run(self, stream: _Stream, steps: int, loss: Callable) -> None:
        """The first half fills moving averages and memories, and is not compared."""
        for batch in stream.take(steps // 2):
            loss(self._model, batch)
        self._squares = {name: torch.zeros(2, dtype=torch.float64) for name in self._norms}
        self._shares: dict[str, list[float]] = {}
        losses = []
        listeners = {name: self._listener(name) for name in self._norms}
        for batch in stream.take(steps - steps // 2):
            with torch.random.fork_rng(), _listening(self._norms, listeners):
                train = loss(self._model, batch)
            with self._population_statistics(), _evaluating(self._norms.values()):
                losses.append((train.item(), loss(self._model, batch).item()))
        self.losses = tuple(torch.tensor(losses).mean(0).tolist())
        for name, (difference, size) in self._squares.items():
            self.differences[name] = (difference / size).sqrt().item() if size else 0.0
        self.clipped = {name: sum(shares) / len(shares) for name, shares in self._shares.items()}

    def _listener(self, name: str) -> Callable:
        mean, var = self._population[name]

        def listen(norm: nn.Module, args: tuple, out: torch.Tensor) -> None:
            (x,) = args
            if x.dim() != 4 or not x.numel():
                return
            scale = (var + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight
            centered = affine_map(x, mean, scale)
            difference = out - centered
            if norm.bias is not None:
                difference -= norm.bias.to(out.dtype)[:, None, None]
            squares = [difference.double().square().sum(), centered.double().square().sum()]
            self._squares[name] += torch.stack(squares).cpu()
            if isinstance(norm, MABN2d):
                _, r = moving_average_and_r(norm)
                share = clipped_share(norm, r).mean().item()
                self._shares.setdefault(name, []).append(share)

        return listen

    @contextlib.contextmanager
    def _population_statistics(self) -> Iterator[None]:
        current = [(n.running_mean.clone(), n.running_var.clone()) for n in self._norms.values()]
        self._set(self._population.values())
        try:
            yield
        finally:
            self._set(current)

    def _set(self, statistics: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for norm, (mean, var) in zip(self._norms.values(), statistics):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
