"""What is checked of paths, the machine and the command line."""

import argparse
import os
from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from ...checkpoint import last_checkpoint, read_checkpoint


def check_arguments(args: argparse.Namespace) -> None:
    """
    Args:
        args: of Detectron2's `default_argument_parser`.

    Raises:
        ValueError: they do not fit together, or not this machine.
    """
    for option in ("num_gpus", "num_machines"):
        if getattr(args, option) < 1:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} must be a positive integer, got {getattr(args, option)}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank must be in 0 .. {args.num_machines - 1} with --num-machines "
            f"{args.num_machines}, got {args.machine_rank}"
        )
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, this machine has {torch.cuda.device_count()} GPUs"
        )
    if args.num_gpus * args.num_machines == 1:
        return
    if args.dist_url == "auto" and args.num_machines > 1:
        raise ValueError(
            "--dist-url auto is for one machine: give tcp://HOST:PORT of the first one"
        )
    if args.dist_url != "auto" and not args.dist_url.startswith(("tcp://", "file://", "env://")):
        raise ValueError(
            f"--dist-url must be auto or begin with tcp://, file:// or env://, got {args.dist_url!r}"
        )


def check_weights(weights: str, key: str) -> None:
    """
    Args:
        weights: path or URL; "" for none.
        key: of the config, for the message.

    Raises:
        ValueError: it is a path of no file, or the file is no checkpoint.
    """
    if not isinstance(weights, str):
        raise ValueError(f"{key} must be a path, a URL, or '' for none, got {weights!r}")
    path = weights.split("?")[0]  # Detectron2 takes options behind the name
    if not path:
        return
    try:
        is_file = PathManager.isfile(path)
    except NotImplementedError:  # what is behind a URL is seen when it is downloaded
        return
    if not is_file:
        found = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"{key}: {weights} {found}")
    try:
        read_checkpoint(PathManager.get_local_path(path))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def check_start(weights: str, key: str, output_dir: str, resume: bool) -> dict[str, Any]:
    """
    The file that a run starts from: the last checkpoint, if it is resumed and has one, or the weights.

    Args:
        weights, key: of :func:`check_weights`.
        output_dir: folder of the checkpoints.

    Returns:
        the trainer's state in the last checkpoint; {} with weights.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    file = last_checkpoint(output_dir) if resume else ""
    if file:
        return read_checkpoint(file).get("trainer", {})
    check_weights(weights, key)
    return {}


def check_output_dir(folder: str, key: str) -> None:
    """
    Creates nothing.

    Raises:
        ValueError: the folder cannot be created or written to.
    """
    if "://" in folder:
        return
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise ValueError(f"{key}: {folder} cannot be a folder: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{key}: {folder} cannot be written to: no permission for {existing}")
