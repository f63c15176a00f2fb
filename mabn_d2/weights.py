"""
Weights of other code bases as files that Detectron2 loads.

Sources: the authors' release of MABN (https://github.com/megvii-model/MABN), whose detector is
maskrcnn-benchmark's; torchvision's ResNets; Detectron2 itself. Nothing that a file contains is
executed.
"""
import os
import pickle
import re
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import yaml

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from .checkpoint import atomic_write
from .config import add_mabn_config
from .layers import MABN2d

StateDict = Dict[str, torch.Tensor]

FOREIGN_NORM_NOTE = (
    "These weights were trained with BN. They are not for MABN, which needs weights that were "
    "trained with MABN and centralized kernels: fine-tuning with BN weights loses about half of "
    "the AP (https://github.com/megvii-model/MABN/issues/2)."
)


class Weights(NamedTuple):
    """
    Weights under the names of Detectron2.

    Attributes:
        state_dict: Detectron2's names -> tensors.
        author: where they are from; Detectron2 logs it.
        matching_heuristics: whether the names lack the prefix that they have in a model, as in
            `stem.conv1.weight`: Detectron2 then finds the place for them.
        left_over: names of the source file that were not taken.
        config: nested options of a Detectron2 config that go with the weights.
        notes: sentences that the user should read.
    """

    state_dict: StateDict
    author: str
    matching_heuristics: bool
    left_over: List[str]
    config: Dict[str, Any]
    notes: List[str]

    @property
    def norm(self) -> str:
        """'MABN', 'BN' or '', told by the statistics."""
        if any(key.endswith(".psi.count") for key in self.state_dict):
            return "MABN"
        return "BN" if any(re.search(r"running_mean|_bn_", key) for key in self.state_dict) else ""


class Match(NamedTuple):
    """How weights fit a model: names of the model's tensors, and of the file's that fit none."""

    matched: List[str]
    missing: List[str]
    left_over: List[str]


# ---------------------------------------------------------------------------------------- reading


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How pickle's protocol 2 writes bytes."""
    return text.encode("latin1")


_PICKLED_TYPES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    for _module, _name, _function in (
        ("multiarray", "_reconstruct", np.zeros(1).__reduce__()[0]),
        ("multiarray", "scalar", np.float64(0).__reduce__()[0]),
        ("numeric", "_frombuffer", np.zeros(1).__reduce_ex__(5)[0]),
    ):
        _PICKLED_TYPES[f"{_core}.{_module}", _name] = _function


class _ArrayUnpickler(pickle.Unpickler):
    """Builds basic types and numpy arrays, and nothing else."""

    def find_class(self, module, name):
        if (module, name) not in _PICKLED_TYPES:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return _PICKLED_TYPES[module, name]


def read_checkpoint(path: str) -> Dict[str, Any]:
    """
    The content of a checkpoint, without executing anything that it may contain.

    Args:
        path: a file of `torch.save`, or a `.pkl` with numpy arrays.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else than a dictionary of tensors, arrays and basic types.
    """
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as f:
                checkpoint = _ArrayUnpickler(f, encoding="latin1").load()
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files raise whatever the parser stumbled over
        raise ValueError(
            f"{path} is not read: only dictionaries of tensors, numpy arrays and basic types are "
            f"accepted, and nothing that could run code ({_reason(error)})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, accepted is a dictionary of tensors"
        )
    return checkpoint


def _reason(error: Exception) -> str:
    """Why a file was refused, in a few words."""
    if not isinstance(error, (pickle.UnpicklingError, RuntimeError)):
        return "the file is damaged or of another format"
    # What PyTorch says around the name of the refused type, it says differently in each version.
    named = re.search(r"(?:class|GLOBAL:?|global) ([\w.]+\.\w+)", str(error))
    reason = f"it contains {named[1]}" if named else str(error).split("\n")[0]
    return " ".join(reason.split())[:200]


def _is_array(value: Any) -> bool:
    is_numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return is_numbers or isinstance(value, torch.Tensor)


def _tensors(entries: Dict[str, Any]) -> StateDict:
    """The tensors and arrays of a dictionary, as tensors that share no memory."""
    return {
        key: torch.as_tensor(value).detach().clone()
        for key, value in entries.items()
        if isinstance(key, str) and _is_array(value)
    }


def _split(checkpoint: Dict[str, Any], wrappers: Iterable[str]) -> Tuple[StateDict, List[str]]:
    """The model's tensors, wherever a checkpoint keeps them, and the names of all other entries."""
    for wrapper in wrappers:
        if isinstance(checkpoint.get(wrapper), dict):
            others = [key for key in checkpoint if key != wrapper]
            checkpoint = checkpoint[wrapper]
            break
    else:
        others = []
    state_dict = _tensors(checkpoint)
    others += [str(key) for key in checkpoint if key not in state_dict]
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key[len("module.") :]: value for key, value in state_dict.items()}
    return state_dict, others


def _found(checkpoint: Dict[str, Any]) -> str:
    keys = [str(key) for key in list(checkpoint)[:4]] + ["..."] * (len(checkpoint) > 4)
    return f"found {len(checkpoint)} entries ({', '.join(keys)})"


# ----------------------------------------------------------------------------------------- naming


def resnet_name(key: str) -> Optional[str]:
    """
    Detectron2's name of a ResNet's tensor: `layer1.0.bn2.bias` -> `res2.0.conv2.norm.bias`.

    Args:
        key: torchvision's name.

    Returns:
        the name, or None for a tensor that Detectron2's ResNet does not have.
    """
    if key in ("fc.weight", "fc.bias"):
        return f"stem.{key}"
    parts = re.fullmatch(r"(?:layer([1-4])\.(\d+)\.)?(conv|bn|downsample\.)(\d)\.(.+)", key)
    if parts is None:
        return None
    stage, block, kind, number, tensor = parts.groups()
    module = "shortcut" if kind == "downsample." else f"conv{number}"
    if kind == "bn" or (kind, number) == ("downsample.", "1"):
        module += ".norm"
    elif tensor != "weight":
        return None
    place = "stem" if stage is None else f"res{int(stage) + 1}.{block}"
    return f"{place}.{module}.{tensor}"


# maskrcnn-benchmark's modules -> Detectron2's.
_DETECTOR_MODULES = {
    **{f"backbone.fpn.fpn_inner{n}": f"backbone.fpn_lateral{n + 1}" for n in (1, 2, 3, 4)},
    **{f"backbone.fpn.fpn_layer{n}": f"backbone.fpn_output{n + 1}" for n in (1, 2, 3, 4)},
    "rpn.head.conv": "proposal_generator.rpn_head.conv",
    "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box.feature_extractor": "roi_heads.box_head",
    "roi_heads.box.feature_extractor.fc6": "roi_heads.box_head.fc1",
    "roi_heads.box.feature_extractor.fc7": "roi_heads.box_head.fc2",
    "roi_heads.box.predictor": "roi_heads.box_predictor",
    "roi_heads.mask.feature_extractor": "roi_heads.mask_head",
    "roi_heads.mask.predictor.conv5_mask": "roi_heads.mask_head.deconv",
    "roi_heads.mask.predictor.mask_fcn_logits": "roi_heads.mask_head.predictor",
}

_BOX_CONVOLUTION = r"(roi_heads\.box\.feature_extractor\.)xconvs\.(\d+)\.(.+)"


def detector_name(key: str) -> Optional[str]:
    """
    Detectron2's name of a tensor of maskrcnn-benchmark's Faster or Mask R-CNN with FPN.

    Args:
        key: maskrcnn-benchmark's name; the box head's convolutions are named `conv1`, ... in place
            of `xconvs.0`, ...

    Returns:
        the name, or None for a tensor that Detectron2's model does not have.
    """
    if key.startswith("backbone.body."):
        name = resnet_name(re.sub(r"^backbone\.body\.(stem\.)?", "", key))
        return name and f"backbone.bottom_up.{name}"
    for module in sorted(_DETECTOR_MODULES, key=len, reverse=True):
        if key.startswith(f"{module}."):
            name = _DETECTOR_MODULES[module] + key[len(module) :]
            # A convolution with a norm is a sequence of both.
            return re.sub(r"(fpn_\w+\d|mask_fcn\d)\.([01])\.", _norm_of_sequence, name)
    return None


def _norm_of_sequence(match: re.Match) -> str:
    return f"{match[1]}.norm." if match[2] == "1" else f"{match[1]}."


def _name_box_convolutions(state_dict: StateDict) -> StateDict:
    """`xconvs.I` is a plain sequence: I becomes the number of the convolution, or of its norm's."""
    parts = {key: re.fullmatch(_BOX_CONVOLUTION, key) for key in state_dict}
    places = sorted(
        int(match[2]) for key, match in parts.items() if match and state_dict[key].dim() == 4
    )

    def name(key: str) -> str:
        if parts[key] is None:
            return key
        prefix, place, tensor = parts[key][1], int(parts[key][2]), parts[key][3]
        module = f"conv{sum(p <= place for p in places)}{'' if place in places else '.norm'}"
        return f"{prefix}{module}.{tensor}"

    return {name(key): value for key, value in state_dict.items()}


def _rename(
    state_dict: StateDict, rename: Callable[[str], Optional[str]]
) -> Tuple[StateDict, List[str]]:
    """The tensors under their new names, and the old names of those without one."""
    names = {key: rename(key) for key in state_dict}
    renamed = {name: state_dict[key] for key, name in names.items() if name is not None}
    return renamed, [key for key, name in names.items() if name is None]


# ------------------------------------------------------------------------------------ conversions


def _release_norm(norm: StateDict) -> StateDict:
    """
    The state of one MABN of the release -> that of a :class:`MABN2d`.

    The detector's norm keeps one statistic per iteration (`iters`, `buffer_x2`, `buffer_gz`); that
    of the classifier keeps those of the last iteration's groups of two images, the oldest first
    (`iters`, `pre_x2`, `pre_gz`, and the constant `sta_matrix`).
    """
    norm = {key: value for key, value in norm.items() if key != "sta_matrix"}
    norm["running_var"] = norm["running_var"].reshape(-1)
    if "buffer_x2" in norm:
        ours = MABN2d(len(norm["running_var"]), buffer_size=len(norm["buffer_x2"]))
        ours.load_state_dict(norm)
        return dict(ours.state_dict())
    groups = len(norm["pre_x2"]) if "pre_x2" in norm else 0
    count = norm.pop("iters", torch.zeros(1)).reshape(()).long() * groups
    for theirs, name in (("pre_x2", "second_moment"), ("pre_gz", "psi")):
        if theirs in norm:
            norm[f"{name}.values"] = norm.pop(theirs)
        norm[f"{name}.count"] = count.clone()
    return norm


def _convert_release_norms(state_dict: StateDict, path: str) -> StateDict:
    """Every norm with a second moment and no mean is a MABN; those of this package stay."""
    state_dict = dict(state_dict)
    keys = list(state_dict)
    for key in keys:
        prefix = key[: -len("running_var")]
        others = (f"{prefix}running_mean", f"{prefix}psi.count")
        if key.endswith(".running_var") and not any(other in state_dict for other in others):
            norm = {k[len(prefix) :]: state_dict.pop(k) for k in keys if k.startswith(prefix)}
            try:
                norm = _release_norm(norm)
            except RuntimeError as error:
                raise ValueError(
                    f"{path} holds {prefix}{{{', '.join(norm)}}}, accepted are a MABN's weight, "
                    "bias, running_var, iters, buffer_x2 and buffer_gz, in shapes that agree"
                ) from error
            state_dict.update({prefix + k: v for k, v in norm.items()})
    return state_dict


def _move_background_last(state_dict: StateDict) -> None:
    """
    The class order of maskrcnn-benchmark -> that of Detectron2, in place.

    Of `1 + K` classes the background is the first there, in scores, boxes and masks. Detectron2
    has it last in the scores and nowhere else. Class-agnostic boxes are those of "class" 1 of 2.
    """
    box, mask = "roi_heads.box_predictor.", "roi_heads.mask_head.predictor."
    for tensor in ("weight", "bias"):
        scores = state_dict.get(f"{box}cls_score.{tensor}")
        if scores is not None:
            state_dict[f"{box}cls_score.{tensor}"] = scores.roll(-1, 0)
        for name, per_class in ((f"{box}bbox_pred.{tensor}", 4), (mask + tensor, 1)):
            if name in state_dict:
                state_dict[name] = state_dict[name][per_class:].clone()


def convert_release(checkpoint: Dict[str, Any], path: str) -> Weights:
    """
    Weights of the authors' release: a detector's checkpoint, or a classifier's as the backbone.

    Args:
        checkpoint: as from :func:`read_checkpoint`.
        path: for messages.

    Raises:
        ValueError: the names are not those of the release.
    """
    state_dict, others = _split(checkpoint, ("model", "state_dict"))
    detector = any(key.startswith("backbone.body.") for key in state_dict)
    if detector and not any(key.startswith("backbone.fpn.") for key in state_dict):
        raise ValueError(f"{path} holds a detector without FPN, accepted are those with FPN")
    if not detector and not _is_resnet(state_dict):
        raise ValueError(
            f"{path} is not of the MABN release: {_found(state_dict or checkpoint)}, accepted are "
            "detectors of maskrcnn-benchmark (backbone.body.stem.conv1.weight, ...) and ResNets "
            "(conv1.weight, layer1.0.conv1.weight, ...)"
        )
    if not detector and "bn1.running_mean" in state_dict:
        raise ValueError(
            f"{path} is not of the MABN release: its norms are BN (bn1.running_mean), accepted "
            "with --from torchvision"
        )
    state_dict = _convert_release_norms(state_dict, path)
    if detector:
        return _release_detector(state_dict, others)
    state_dict, unknown = _rename(state_dict, resnet_name)
    config = _resnet_config(state_dict, "MABN", stride_in_1x1=False)
    _merge(config, _pixels("BGR", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]))
    notes = [
        "The config is that of the release's classifier. The release's detector starts from its "
        "weights with PIXEL_MEAN [102.9801, 115.9465, 122.7717] and STRIDE_IN_1X1 True."
    ]
    return Weights(state_dict, "MABN release", True, others + unknown, config, notes)


def _release_detector(state_dict: StateDict, others: List[str]) -> Weights:
    state_dict, unknown = _rename(_name_box_convolutions(state_dict), detector_name)
    _move_background_last(state_dict)
    weights = Weights(state_dict, "MABN release", False, others + unknown, {}, [])
    norm = weights.norm
    body = "backbone.bottom_up."
    _merge(
        weights.config,
        _resnet_config(
            {key[len(body) :]: v for key, v in state_dict.items() if key.startswith(body)},
            norm, stride_in_1x1=True,
        ),
        _pixels("BGR", [102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]),
        {"MODEL": _heads_config(state_dict)},
    )  # fmt: skip
    weights.notes.append(
        "maskrcnn-benchmark counts a box's last pixel in its width (TO_REMOVE = 1), rounds its "
        "anchors, and pools without the half-pixel shift. OFFSET and POOLER_TYPE bring Detectron2 "
        "close, not to the same boxes: expect a slightly different AP without further training."
    )
    if norm == "BN":
        weights.notes.append(FOREIGN_NORM_NOTE)
    return weights


def convert_torchvision(checkpoint: Dict[str, Any], path: str) -> Weights:
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
    state_dict, others = _split(checkpoint, ("state_dict", "model"))
    if not _is_resnet(state_dict):
        raise ValueError(
            f"{path} is not a ResNet of torchvision: {_found(state_dict or checkpoint)}, accepted "
            "are conv1.weight, bn1.weight, layer1.0.conv1.weight, ..."
        )
    if "bn1.iters" in state_dict:
        raise ValueError(
            f"{path} is not a ResNet of torchvision: its norms are those of the MABN release "
            "(bn1.iters), accepted with --from mabn-release"
        )
    state_dict, unknown = _rename(state_dict, resnet_name)
    weights = Weights(state_dict, "torchvision", True, others + unknown, {}, [])
    resnet = _resnet_config(state_dict, weights.norm, stride_in_1x1=False)
    _merge(weights.config, _torchvision_config(), resnet)
    if weights.norm == "BN":
        weights.notes.append(FOREIGN_NORM_NOTE)
    return weights


def convert_detectron2(checkpoint: Dict[str, Any], path: str) -> Weights:
    """
    Weights of a checkpoint of Detectron2 or of its model zoo, without the trainer's state.

    Args:
        checkpoint: as from :func:`read_checkpoint`.
        path: for messages.

    Raises:
        ValueError: the layout or the names are not those of Detectron2.
    """
    if "blobs" in checkpoint or "conv1_w" in checkpoint:
        return _convert_caffe2(checkpoint)
    state_dict, others = _split(checkpoint, ("model",))
    names = [re.match(r"backbone\.(?!body\.|fpn\.)|stem\.|res2\.", key) for key in state_dict]
    if "model" not in checkpoint or not any(names) or any(
        key.startswith("backbone.body.") for key in state_dict
    ):  # fmt: skip
        raise ValueError(
            f"{path} is not of Detectron2: {_found(state_dict or checkpoint)}, accepted is "
            "{'model': {'backbone.bottom_up.stem.conv1.weight': ..., or 'stem.conv1.weight': ...}}"
        )
    heuristics = bool(checkpoint.get("matching_heuristics", False))
    author = str(checkpoint.get("__author__", "Detectron2"))
    others = [key for key in others if key not in ("__author__", "matching_heuristics")]
    config = {} if author != "torchvision" else _torchvision_config()
    weights = Weights(state_dict, author, heuristics, others, config, [])
    if weights.norm == "BN":
        weights.notes.append(FOREIGN_NORM_NOTE)
    return weights


def _convert_caffe2(checkpoint: Dict[str, Any]) -> Weights:
    """Detectron2 itself renames these while it loads them, told by the author."""
    blobs = checkpoint.get("blobs", checkpoint)
    state_dict = {k: v for k, v in _tensors(blobs).items() if not k.endswith("_momentum")}
    left_over = [key for key in {**checkpoint, **blobs} if key not in state_dict and key != "blobs"]
    pixels = _pixels("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0])
    _merge(pixels, {"MODEL": {"RESNETS": {"STRIDE_IN_1X1": True}}})
    return Weights(state_dict, "Caffe2", True, left_over, pixels, [FOREIGN_NORM_NOTE])


SOURCES: Dict[str, Callable[[Dict[str, Any], str], Weights]] = {
    "mabn-release": convert_release,
    "torchvision": convert_torchvision,
    "detectron2": convert_detectron2,
}


def load_weights(path: str, source: str) -> Weights:
    """
    Reads and converts a file.

    Args:
        path: the file.
        source: a key of `SOURCES`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what the source writes. The message is one line that names the file,
            what was found and what is accepted.
    """
    return SOURCES[source](read_checkpoint(path), path)


def save_weights(weights: Weights, path: str) -> None:
    """
    Writes a file that `DetectionCheckpointer` loads, completely or not at all.

    Raises:
        ValueError: the name is not that of a new `.pth` file in an existing folder.
        OSError: the file cannot be written.
    """
    check_destination(path)
    content = {"model": weights.state_dict, "__author__": weights.author}
    if weights.matching_heuristics:
        content["matching_heuristics"] = True
    with atomic_write(path) as f:
        torch.save(content, f)


def check_destination(path: str) -> None:
    """
    Raises:
        ValueError: the name is not that of a new `.pth` file in an existing folder.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} exists and is not overwritten")
    if not path.endswith(".pth"):
        raise ValueError(f"{path} must end in .pth, by which Detectron2 knows the format")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"{path} cannot be written: the folder does not exist")


# ----------------------------------------------------------------------------------- descriptions


_DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def _is_resnet(state_dict: StateDict) -> bool:
    return "conv1.weight" in state_dict and "layer1.0.conv1.weight" in state_dict


def _resnet_config(state_dict: StateDict, norm: str, stride_in_1x1: bool) -> Dict[str, Any]:
    """Options of a ResNet, told by the tensors under Detectron2's names, without a prefix."""
    blocks = {tuple(key.split(".")[:2]) for key in state_dict if re.match(r"res\d\.\d", key)}
    counts = tuple(sum(stage == f"res{n}" for stage, _ in blocks) for n in (2, 3, 4, 5))
    bottleneck = "res2.0.conv3.weight" in state_dict
    options: Dict[str, Any] = {"NORM": norm, "STRIDE_IN_1X1": stride_in_1x1}
    if (bottleneck, counts) in _DEPTHS:
        options["DEPTH"] = _DEPTHS[bottleneck, counts]
    if not bottleneck:
        options["RES2_OUT_CHANNELS"] = 64
    elif "res2.0.conv2.weight" in state_dict:
        width, per_group = state_dict["res2.0.conv2.weight"].shape[:2]
        if (width, per_group) != (64, 64):
            groups = width // per_group
            options.update(NUM_GROUPS=groups, WIDTH_PER_GROUP=width // groups)
    return {"MODEL": {"RESNETS": options}}


def _heads_config(state_dict: StateDict) -> Dict[str, Any]:
    """Options of what follows a detector's backbone."""

    def norm(prefix: str) -> str:
        keys = [key for key in state_dict if key.startswith(prefix) and ".norm." in key]
        return "MABN" if any("psi" in key for key in keys) else "BN" if keys else ""

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, key) is not None for key in state_dict)

    box, mask = "roi_heads.box_head.", "roi_heads.mask_head."
    pooler = {"POOLER_TYPE": "ROIAlign", "POOLER_SAMPLING_RATIO": 2}
    options = {
        "FPN": {"NORM": norm("backbone.fpn_")},
        "ANCHOR_GENERATOR": {"OFFSET": 0.5},
        "ROI_BOX_HEAD": {
            "NORM": norm(box),
            "NUM_CONV": count(re.escape(box) + r"conv\d+\.weight"),
            "NUM_FC": count(re.escape(box) + r"fc\d+\.weight"),
            **pooler,
        },
    }
    if "roi_heads.box_predictor.cls_score.weight" in state_dict:
        classes = len(state_dict["roi_heads.box_predictor.cls_score.weight"]) - 1
        options["ROI_HEADS"] = {"NUM_CLASSES": classes}
    if count(re.escape(mask) + ".+"):
        convolutions = count(re.escape(mask) + r"mask_fcn\d+\.weight")
        options["ROI_MASK_HEAD"] = {"NORM": norm(mask), "NUM_CONV": convolutions, **pooler}
    return {**options, "MASK_ON": "ROI_MASK_HEAD" in options}


def _pixels(channels: str, mean: List[float], std: List[float]) -> Dict[str, Any]:
    return {
        "MODEL": {"PIXEL_MEAN": mean, "PIXEL_STD": std},
        "INPUT": {"FORMAT": channels},
    }


def _torchvision_config() -> Dict[str, Any]:
    config = _pixels("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    _merge(config, {"MODEL": {"RESNETS": {"STRIDE_IN_1X1": False}}})
    return config


def _merge(options: Dict[str, Any], *others: Dict[str, Any]) -> None:
    for other in others:
        for key, value in other.items():
            if isinstance(value, dict):
                _merge(options.setdefault(key, {}), value)
            else:
                options[key] = value


def load_config(path: str) -> CfgNode:
    """
    A config of Detectron2 or of this package, on the CPU.

    Raises:
        OSError, ValueError: the file cannot be read or is not such a config.
    """
    cfg = get_cfg()
    add_mabn_config(cfg)
    try:
        cfg.merge_from_file(path)
    except (KeyError, AttributeError, AssertionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a config of Detectron2: {error}") from error
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def match_model(weights: Weights, cfg: CfgNode) -> Match:
    """What the model of a config takes from the weights, matched as Detectron2 does."""
    model = build_model(cfg).state_dict()
    theirs = weights.state_dict
    if weights.matching_heuristics:
        caffe2 = weights.author == "Caffe2"
        theirs = align_and_update_state_dicts(model, dict(theirs), c2_conversion=caffe2)
    matched = [k for k, v in model.items() if k in theirs and theirs[k].shape == v.shape]
    known = set(matched)
    return Match(
        matched,
        [key for key in model if key not in known],
        [key for key in theirs if key not in known],
    )


def _grouped(keys: Iterable[str]) -> List[str]:
    """`a.norm.bias`, `a.norm.psi.count` -> `a.norm.{bias, psi.count}`: one line for each module."""
    modules: Dict[str, List[str]] = {}
    for key in keys:
        parts = re.fullmatch(r"(.+?)\.((?:(?:psi|second_moment)\.)?[^.]+)", key)
        module, tensor = parts.groups() if parts else ("", key)
        modules.setdefault(module, []).append(tensor)
    return [
        f"{module}.{{{', '.join(names)}}}" if module and len(names) > 1
        else ".".join(filter(None, (module, names[0]))) if module else ", ".join(names)
        for module, names in modules.items()
    ]  # fmt: skip


def _listed(title: str, keys: List[str]) -> List[str]:
    return [f"{title}: {len(keys)}", *(f"  {line}" for line in _grouped(keys))]


def describe(weights: Weights, match: Optional[Match] = None, config_file: str = "") -> str:
    """
    The report of a conversion.

    Args:
        weights: the result of it.
        match: of a model, described too.
        config_file: the model's name in the report.
    """
    norm = f", norm {weights.norm}" if weights.norm else ""
    lines = [f"matched: {len(weights.state_dict)} tensors ({weights.author}{norm})"]
    lines += _listed("left over", weights.left_over)
    if match is not None:
        total = len(match.matched) + len(match.missing)
        lines += [f"model of {config_file}", f"  takes {len(match.matched)} of its {total} tensors"]
        lines += [f"  {line}" for line in _listed("misses", match.missing)]
        lines += [f"  {line}" for line in _listed("leaves over", match.left_over)]
    return "\n".join(lines)


def config_lines(weights: Weights, path: str) -> str:
    """The part of a Detectron2 config, in YAML, that goes with weights in the file `path`."""
    options: Dict[str, Any] = {"MODEL": {"WEIGHTS": path}}
    _merge(options, weights.config)
    return yaml.safe_dump(options, sort_keys=False, default_flow_style=None, width=200).rstrip()
