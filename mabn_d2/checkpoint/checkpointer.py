"""Checkpoints that are whole or not there, and that execute nothing when they are loaded."""

import logging
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import _strip_prefix_if_present
from torch import distributed, nn

from ..layers import CentralizedKernel, MABN2d
from ..layers.importing import is_of_mabn
from ..surgery.weights import has_statistics
from ..utils.files import atomic_write
from .matching import Matched, match_to_model
from .reading import read_checkpoint

logger = logging.getLogger(__name__)

WEIGHTS_IMPORT = ("exact", "adapt", "as_is")
_MABN_NEEDS = (
    " MABN centralizes their kernels and does not center: that is kept with MODEL.WEIGHTS_IMPORT "
    "(train.weights_import) 'exact' where the weights are those of BN or of no norm."
)
_MABN_HAS = " MABN's kernels are centralized where they are used, not in the file."


class Checkpointer(DetectionCheckpointer):
    """
    A `DetectionCheckpointer` that differs in six points.

    1. It writes to local disk such that a job killed at any moment leaves the last complete checkpoint,
       and a `last_checkpoint` that names it.
    2. It loads tensors, arrays and basic types only, see :func:`read_checkpoint`.
    3. The ring buffers of norms are resampled to the model's sizes.
    4. Where the weights were trained with another norm, so that the model computes another function, it
       says so.
    5. To resume, all workers load what the first one reads: machines need not share a disk.
    6. Weights of BN, of an affine map or of no norm keep their function in the norms of this package, and
       those of MABN in BN, see :func:`mabn_d2.surgery.from_bn`.

    Attributes:
        unmeasured: names of the norms whose statistics a trainer takes from its data before it begins.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        weights_import: str = "exact",
        **options,
    ):
        """
        Args:
            weights_import: what norms do with weights of other norms: "exact", as above; "as_is", they load
                what has the right name; "adapt", the same, and a trainer re-estimates all statistics. A
                resumed run loads what it saved.
            options: of `DetectionCheckpointer`.

        Raises:
            ValueError: `weights_import` is another.
        """
        if weights_import not in WEIGHTS_IMPORT:
            accepted = ", ".join(map(repr, WEIGHTS_IMPORT))
            raise ValueError(
                f"weights_import: {weights_import!r} is not known, accepted are {accepted}"
            )
        super().__init__(model, save_dir, **options)
        self.weights_import = weights_import
        self.unmeasured: list[str] = []

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """
        Args:
            path: file or URL, with Detectron2's `?matching_heuristics=True` behind it or not; "" for none.
            checkpointables: names of those to load besides the model; None for all.

        Returns:
            what was in the file beyond that.

        Raises:
            OSError, ValueError: of :func:`read_checkpoint`.
        """
        if not path:
            return super().load(path)
        exact = self.weights_import == "exact"
        rest = self._restore(path, self._read(path), checkpointables, exact)
        if self.weights_import == "adapt":
            modules = self.model.named_modules()
            self.unmeasured = [name for name, module in modules if has_statistics(module)]
        return rest

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """
        Loads the last checkpoint of the folder of the first worker, on all workers, or else the weights.

        Args:
            path: of the weights, as for :meth:`load`.
            resume: whether to look for a checkpoint.

        Raises:
            OSError, ValueError: the checkpoint cannot be read; on all workers.
        """
        if resume:
            file, checkpoint = _from_main_worker(self._read_last_checkpoint)
            if file:
                return self._restore(file, checkpoint, None)
        return self.load(path, checkpointables=[])

    def log_evaluation_only(self) -> None:
        """Says so where "adapt" has no training data to adapt to."""
        if self.weights_import == "adapt" and self.unmeasured:
            self.logger.warning(
                "MODEL.WEIGHTS_IMPORT (train.weights_import) 'adapt' is 'as_is' without training: the statistics "
                "of %d norms are not re-estimated", len(self.unmeasured),
            )  # fmt: skip

    def _read_last_checkpoint(self) -> tuple[str, dict[str, Any]]:
        file = self.get_checkpoint_file()
        return file, self._load_file(file) if file else {}

    def get_checkpoint_file(self) -> str:
        return last_checkpoint(self.save_dir)

    def _read(self, path: str) -> dict[str, Any]:
        """The content of a file or URL, laid out as `{"model": ..., ...}`."""
        self.logger.info("Loading from %s", path)
        url = urlsplit(path)
        options = parse_qs(url.query)
        heuristics = options.pop("matching_heuristics", ["False"]) == ["True"]
        if options:
            raise ValueError(f"{path}: the option {', '.join(options)} behind the name is unknown")
        file = self.path_manager.get_local_path(url._replace(query="").geturl())
        if not os.path.exists(file):
            raise FileNotFoundError(f"{path} does not exist")
        data = self._load_file(file)
        return {**data, "matching_heuristics": True} if heuristics else data

    def _load_file(self, filename: str) -> dict[str, Any]:
        """
        Detectron2 tells the layout by the end of the name, which is how `.pkl` of Caffe2 and `.pyth` of
        pycls are known here, too. How a file is read does not depend on its name.
        """
        data = read_checkpoint(filename)
        if filename.endswith(".pkl") and not ("model" in data and "__author__" in data):
            blobs = {
                k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")
            }
            return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            if "model_state" not in data:
                raise ValueError(f"{filename} lacks 'model_state', which a .pyth of pycls has")
            state = data["model_state"].items()
            state = {k: v for k, v in state if not k.endswith("num_batches_tracked")}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
        return data if "model" in data else {"model": data}

    def _restore(
        self,
        path: str,
        checkpoint: dict[str, Any],
        checkpointables: list[str] | None,
        exact: bool = False,
    ) -> dict[str, Any]:
        """Loads the model and what else is asked for; returns the rest."""
        checkpoint = dict(checkpoint)
        state_dict = checkpoint["model"]
        self._convert_ndarray_to_tensor(state_dict)
        _strip_prefix_if_present(state_dict, "module.")
        matched = match_to_model(
            self.model,
            state_dict,
            by_end=checkpoint.pop("matching_heuristics", False),
            caffe2=checkpoint.get("__author__") == "Caffe2",
            exact=exact,
        )
        self.unmeasured = matched.imported.affine if matched.imported else []
        _log_match(path, matched)
        checkpoint["model"] = state_dict = matched.state_dict
        _load_as_matched(self.model, state_dict)
        self._log_incompatible_keys(self._load_model(checkpoint))
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                self.logger.info("Loading %s from %s", key, path)
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
        return checkpoint

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        if getattr(self.model, "matching_heuristics", False):
            data["matching_heuristics"] = True  # names may be matched by their ends
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        self._remove_partial_files()
        with atomic_write(path) as f:
            torch.save(data, f)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint"), "w") as f:
            f.write(last_filename_basename)

    def _remove_partial_files(self) -> None:
        """What a job that was killed while it saved has left."""
        for name in os.listdir(self.save_dir):
            if name.startswith(".model_") or name.startswith(".last_checkpoint."):
                os.remove(os.path.join(self.save_dir, name))


def _load_as_matched(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Leaves nothing to the layers' own import of BN, in place."""
    for name, module in model.named_modules():
        if isinstance(module, CentralizedKernel) and f"{name}.weight" in state_dict:
            state_dict.setdefault(f"{name}.kernel_mean", torch.zeros_like(module.kernel_mean))
        elif isinstance(module, MABN2d) and not is_of_mabn(state_dict, f"{name}."):
            state_dict.pop(f"{name}.running_mean", None)


def last_checkpoint(folder: str) -> str:
    """
    The file that `last_checkpoint` of an output folder names; "" if there is none.

    Raises:
        ValueError: it names a file elsewhere.
    """
    tag = os.path.join(folder, "last_checkpoint")
    try:
        with PathManager.open(tag) as f:
            name = f.read().strip()
    except OSError:
        return ""
    if name in ("", ".", "..") or name != os.path.basename(name):
        raise ValueError(f"{tag} names {name!r}, accepted is the name of a file in the same folder")
    return os.path.join(folder, name)


def _log_match(path: str, matched: Matched) -> None:
    """At most one line on the ring buffers, one on what was imported, and one for each pair of norms."""
    if matched.ring_buffers:
        changes = [f"{number} {change}" for change, number in matched.ring_buffers.items()]
        level = logging.WARNING if "anew" in str(changes) else logging.INFO
        logger.log(level, "%s: of the norms' ring buffers %s", path, "; ".join(changes))
    imported = matched.imported
    if imported and (imported.with_statistics or imported.affine):
        logger.info("%s: %s", path, imported)
    for name, reason in imported.refused.items() if imported else ():
        logger.warning(
            "%s: %s does not keep the function of the file's norm: %s", path, name, reason
        )
    for (theirs, ours), names in matched.foreign_norms.items():
        logger.warning(
            "%s holds weights of another norm: %s for %d layers that have %s (%s%s). They compute another "
            "function than they were trained for.%s",
            path, theirs or "none", len(names), ours or "none", names[0], ", ..." * (len(names) > 1),
            _MABN_NEEDS if ours.startswith("MABN") else _MABN_HAS if theirs.startswith("MABN") else "",
        )  # fmt: skip


def _from_main_worker(function: Callable[[], Any]) -> Any:
    """What the first worker's call of the function returns or raises, on all workers."""
    if comm.get_world_size() == 1:
        return function()
    result: list[Any] = [None]
    if comm.is_main_process():
        try:
            result = [function()]
        except (OSError, ValueError) as error:
            result = [error]
    distributed.broadcast_object_list(result, src=0, group=comm._get_global_gloo_group())
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]
