"""Iterations per second of a ResNet-50 in evaluation with each norm, with and without folding."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torchvision
from torch import nn

from ..layers import MABN2d
from ..surgery import centralize, fold

WARMUP_RUNS = 3


class Result(NamedTuple):
    """Seconds of one iteration of a network, one per round."""

    name: str
    times: list[float]

    @property
    def per_second(self) -> float:
        return 1 / statistics.median(self.times)


class _LayerNorm(nn.GroupNorm):
    """Over channels and pixels, as the paper's LN."""

    def __init__(self, channels: int):
        super().__init__(1, channels)


def _resnet50(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None, norm_layer=norm)
    centralize(model)
    return model.eval()


def make_networks() -> dict[str, nn.Module]:
    """The networks of the paper's comparison by name, and those that bound it."""
    bn, mabn = _resnet50(nn.BatchNorm2d), _resnet50(MABN2d)
    return {
        "BN folded": fold(bn),
        "MABN folded": fold(mabn),
        "no norm": _resnet50(lambda channels: nn.Identity()),
        "BN": bn,
        "MABN": mabn,
        "IN": _resnet50(lambda channels: nn.InstanceNorm2d(channels, affine=True)),
        "GN": _resnet50(lambda channels: nn.GroupNorm(32, channels)),
        "LN": _resnet50(_LayerNorm),
    }


def benchmark_inference(
    networks: dict[str, nn.Module], x: torch.Tensor, rounds: int
) -> list[Result]:
    """
    Times the networks on an input, one after the other in each round.

    Args:
        x: shape (N, 3, H, W), on the device that is measured.
        rounds: how often each network is timed.
    """
    networks = {name: network.to(x.device) for name, network in networks.items()}
    results = {name: Result(name, []) for name in networks}
    with torch.inference_mode():
        for round_ in range(-WARMUP_RUNS, rounds):
            for name, network in networks.items():
                _wait_for(x.device)
                start = time.perf_counter()
                network(x)
                _wait_for(x.device)
                if round_ >= 0:
                    results[name].times.append(time.perf_counter() - start)
    return list(results.values())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def format_results(results: list[Result]) -> str:
    """A Markdown table, with the ratio to the first network as the median over the rounds."""
    lines = [
        f"| network | iterations/s | 10th..90th percentile | time / {results[0].name} |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        low, *_, high = statistics.quantiles(result.times, n=10)
        ratio = statistics.median(a / b for a, b in zip(result.times, results[0].times))
        lines.append(
            f"| {result.name} | {result.per_second:.2f} | {1 / high:.2f}..{1 / low:.2f} | {ratio:.3f} |"
        )
    return "\n".join(lines)
