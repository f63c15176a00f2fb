"""Iterations per second of a network in evaluation with each norm, with and without folding."""

import csv
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn

from ..layers import MABN2d
from ..surgery import centralize, find_norm_sites, fold
from ..surgery.folding import replace_module
from ..surgery.sites import is_norm, num_channels
from ..utils.files import atomic_write

WARMUP_RUNS = 3
# Iterations per second of a ResNet-50 in the paper, which folds MABN and BN.
PAPER = {"BN folded": 237.88, "MABN folded": 237.88, "LN": 125.44, "IN": 105.60, "GN": 99.37}


class Result(NamedTuple):
    """Seconds of one iteration of a network, one per round."""

    name: str
    times: list[float]

    @property
    def per_second(self) -> float:
        return 1 / statistics.median(self.times)

    @property
    def percentiles(self) -> tuple[float, float]:
        """The 10th and the 90th of the iterations per second."""
        low, *_, high = statistics.quantiles(self.times, n=10)
        return 1 / high, 1 / low

    def ratio(self, other: "Result") -> float:
        """How many times longer it takes than another: the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.times, other.times))


class _LayerNorm(nn.GroupNorm):
    """Over channels and pixels, as the paper's LN."""

    def __init__(self, channels: int):
        super().__init__(1, channels)


def _resnet50() -> nn.Module:
    return torchvision.models.resnet50(weights=None)


def _mask_rcnn() -> nn.Module:
    """
    Detectron2's Mask R-CNN R50-FPN, BN in backbone, FPN and mask head.

    Scores and deltas are 0: whatever the norm, it finds the same 1000 proposals and 100 detections.
    """
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3  # of which each has a score of 1/4
    for part in ("RESNETS", "FPN", "ROI_MASK_HEAD"):
        cfg.MODEL[part].NORM = "BN"
    model = build_model(cfg)
    rpn, predictor = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    for layer in (
        rpn.objectness_logits, rpn.anchor_deltas, predictor.cls_score, predictor.bbox_pred,
    ):  # fmt: skip
        nn.init.zeros_(layer.weight)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet50": _resnet50, "mask_rcnn": _mask_rcnn}


def make_networks(model: str = "resnet50") -> dict[str, nn.Module]:
    """
    The networks of the paper's comparison by name, and those that bound it.

    Args:
        model: one of `MODELS`.
    """

    def with_norm(norm: Callable[[Any], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        network = MODELS[model]()
        for site in find_norm_sites(network, is_norm):
            replace_module(network, site.norm, norm(num_channels(site.norm)))
        centralize(network)
        return network.eval()

    bn, mabn = with_norm(nn.BatchNorm2d), with_norm(MABN2d)
    return {
        "BN folded": fold(bn),
        "MABN folded": fold(mabn),
        "no norm": with_norm(lambda channels: nn.Identity()),
        "BN": bn,
        "MABN": mabn,
        "IN": with_norm(lambda channels: nn.InstanceNorm2d(channels, affine=True)),
        "GN": with_norm(lambda channels: nn.GroupNorm(32, channels)),
        "LN": with_norm(_LayerNorm),
    }


def make_input(model: str, images: int, size: int, device: torch.device) -> Any:
    """Random square images, as the model takes them."""
    x = torch.randn(images, 3, size, size, device=device)
    return x if model == "resnet50" else [{"image": image} for image in 60 * x + 110]


def benchmark_inference(
    networks: dict[str, nn.Module], x: Any, rounds: int, device: torch.device
) -> list[Result]:
    """
    Times the networks on an input, one after the other in each round.

    Args:
        x: the networks' argument.
        rounds: how often each network is timed.
        device: where the networks run.
    """
    networks = {name: network.to(device) for name, network in networks.items()}
    results = {name: Result(name, []) for name in networks}
    with torch.inference_mode():
        for round_ in range(-WARMUP_RUNS, rounds):
            for name, network in networks.items():
                _wait_for(device)
                start = time.perf_counter()
                network(x)
                _wait_for(device)
                if round_ >= 0:
                    results[name].times.append(time.perf_counter() - start)
    return list(results.values())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def format_results(results: list[Result], paper: dict[str, float] | None = None) -> str:
    """
    A Markdown table, with the ratio to the first network as the median over the rounds.

    Args:
        paper: the iterations per second that a paper reports by the network's name.
    """
    first = results[0]
    lines = [
        f"| network | iterations/s | 10th..90th percentile | time / {first.name} |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        low, high = result.percentiles
        lines.append(
            f"| {result.name} | {result.per_second:.2f} | {low:.2f}..{high:.2f} | "
            f"{result.ratio(first):.3f} |"
        )
    if paper:
        lines = [f"{line} {cell} |" for line, cell in zip(lines, _paper_column(results, paper))]
    return "\n".join(lines)


def _paper_column(results: list[Result], paper: dict[str, float]) -> list[str]:
    first = paper[results[0].name]
    cells = (f"{first / paper[r.name]:.3f}" if r.name in paper else "" for r in results)
    return ["the paper's", "---", *cells]


def write_csv(path: str | os.PathLike, results: list[Result], settings: dict[str, Any]) -> None:
    """
    One row per network.

    Args:
        settings: columns that all rows have in common.
    """
    with atomic_write(os.fspath(path), "w") as file:
        writer = csv.writer(file)
        measured = ["network", "median_s", "p10_s", "p90_s", f"time/{results[0].name}"]
        writer.writerow([*settings, *measured])
        for result in results:
            high, low = (1 / value for value in result.percentiles)
            values = [1 / result.per_second, low, high, result.ratio(results[0])]
            writer.writerow([*settings.values(), result.name, *(f"{v:.6f}" for v in values)])
