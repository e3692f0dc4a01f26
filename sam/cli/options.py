"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from fastsam_kernels import KERNELS

from ..build_sam import load_model
from ..checks import path_of
from ..modeling import Sam
from ..system.hardware import usable_device

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_model_options(parser: argparse.ArgumentParser, checkpoint: bool = True) -> None:
    """``checkpoint``: an option too; else the command has an argument of that name."""
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            type=file_name,
            metavar="FILE",
            help="weights in any known layout (default: the embedded nano)",
        )
    parser.add_argument(
        "--variant", "--model-type", help="what the weights must be, for example vit_b (default: inferred)"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="side of the model's input (default: the weights')"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="implementation of the operations")


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def file_name(text: str) -> str:
    """Return the name of a file or folder as given, if it is one."""
    try:
        path_of("it", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def model_from(args: argparse.Namespace) -> Sam:
    return load_model(
        args.checkpoint,
        args.variant,
        _device(args.device),
        DTYPES[args.dtype],
        args.kernels,
        image_size=args.image_size,
    )


def _device(name: str | None) -> torch.device:
    device = usable_device(name)
    if device.type == "meta":
        raise ValueError(f"device {name!r} asked for, whose tensors have no values")
    return device


class Steps:
    """A progress bar over named steps on stderr, silent where that is no terminal, that also times them."""

    def __init__(self, total: int) -> None:
        self.milliseconds: dict[str, float] = {}
        self._bar = tqdm(total=total, disable=None, leave=False, bar_format="{desc:<24}{bar} {n_fmt}/{total_fmt}")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._bar.set_description_str(name)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.milliseconds[name] = 1000 * (time.perf_counter() - start)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
