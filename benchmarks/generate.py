"""Automatic masks as a whole, time and memory, against Meta's package with the same weights.

    python -m benchmarks.generate time --segment-anything PATH [--dtype bf16]
    python -m benchmarks.generate memory --segment-anything PATH
    python -m benchmarks.generate tail --segment-anything PATH

PATH is the folder from which ``import segment_anything`` works. ViT-B with random weights, a grid of 32 x 32 clicks.
The encoder and the decoder do their work; what they say is then replaced by discs of which a tenth is confident, no
two by the same click, so that what comes after has to do with masks as they are.

- time: in one process, one after the other, an image of 1024 x 1024. The official code decodes a quarter of the
  clicks; each of the other quarters is taken to last as long.
- memory: each in a process of its own, an image of 3000 x 4000; the most that is resident at a time, beyond what was
  before the call. The official code decodes one batch of 64 clicks: it holds nothing larger later.
- tail: only what comes after the decoder, of 3072 masks all of which are confident and a tenth stable.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sam
from sam import ImageEmbedding, Sam, SamAutomaticMaskGenerator
from sam.inference.fused_decoder import DecodedPrompts
from sam.masks.results import DecodedMasks
from sam.prompts.batch import PromptBatch

from .model.automatic_masks import Tail
from .operations.mask_postprocess import discs
from .peers import SegmentAnything, import_segment_anything, official_copy

CLICKS = 32  # a side
BATCH = 64
MAX_MEMORY = "1GB"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class _Numbered(DecodedPrompts):
    rows: Tensor


class Discs:
    """Scripted decoder outputs: of prompt n, in order, logits [3, 256, 256] and predicted IoU [3]."""

    def __init__(self) -> None:
        masks = 3 * CLICKS**2
        self.low_res = discs(masks, 256, torch.device("cpu"), torch.float32, 150.0).unflatten(0, (-1, 3))
        confident = torch.arange(masks) % 10 == 0
        self.iou = torch.where(confident, torch.linspace(0.99, 0.9, masks), 0.5).unflatten(0, (-1, 3))


def random_vit_b() -> Sam:
    torch.manual_seed(0)
    model = sam.build_from_config(sam.VARIANTS["vit_b"]).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if "pos" in name:
            parameter.normal_(std=0.1)  # it starts at zero
    return model


def image_of(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def ours(model: Sam, known: Discs, image: np.ndarray, max_memory: str | None = None) -> Run:
    tokens_of, masks_of = model.decode_tokens, model.decode_masks
    done = 0

    def decode_tokens(embeddings: Sequence[ImageEmbedding], batch: PromptBatch, _: None) -> DecodedPrompts:
        nonlocal done
        rows = torch.arange(done, done + len(batch))
        done += len(batch)
        decoded = replace(tokens_of(embeddings, batch), iou=F.pad(known.iou[rows], (1, 0)))
        return _Numbered(**vars(decoded), rows=rows)

    def decode_masks(decoded: DecodedPrompts, multimask_output: bool, rows: Tensor) -> DecodedMasks:
        masks_of(decoded, multimask_output, rows)
        assert isinstance(decoded, _Numbered)
        return DecodedMasks(known.low_res[decoded.rows[rows]], known.iou[decoded.rows[rows]])

    generator = SamAutomaticMaskGenerator(model, CLICKS, max_memory=max_memory, output_mode="coco_rle")

    def run() -> list[dict[str, Any]]:
        nonlocal done
        done = 0
        model.decode_tokens, model.decode_masks = decode_tokens, decode_masks  # type: ignore[assignment, method-assign]
        return generator.generate(image)

    return run


def official(package: Any, model: Any, known: Discs, image: np.ndarray, batches: int) -> tuple[Run, Run]:
    """Return two runs: encoding alone, and all with the first ``batches`` of clicks."""
    decode = model.mask_decoder.forward
    done = 0

    def forward(**arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal done
        decode(**arguments)
        rows = slice(done, done + BATCH)
        done += BATCH
        return known.low_res[rows], known.iou[rows]

    model.mask_decoder.forward = forward
    grid = sam.utils.amg.build_point_grid(CLICKS)[: batches * BATCH]
    generator = package.SamAutomaticMaskGenerator(model, None, point_grids=[grid], output_mode="coco_rle")

    def run() -> list[dict[str, Any]]:
        nonlocal done
        done = 0
        return generator.generate(image)

    return lambda: package.SamPredictor(model).set_image(image), run


def compare_times(path: str, dtype: str, repeats: int) -> dict[str, Any]:
    package, model, image, known = import_segment_anything(path), random_vit_b(), image_of((1024, 1024)), Discs()
    batches = CLICKS**2 // BATCH // 4
    encode, quarter = official(package, official_copy(package, model), known, image, batches)
    whole = ours(model.to(DTYPES[dtype]), known, image)

    for run in (whole, encode):
        run()
    rows = [{"ours": _seconds(whole), "encode": _seconds(encode), "quarter": _seconds(quarter)} for _ in range(repeats)]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    extrapolated = medians["encode"] + 4 * (medians["quarter"] - medians["encode"])
    return {"dtype": dtype, "runs": rows, "official": extrapolated, "times faster": extrapolated / medians["ours"]}


def compare_tails(path: str, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for size in ((1024, 1024), (1500, 2250)):
        tail = Tail(3 * CLICKS**2, size, torch.device("cpu"))
        forms = {"ours": tail.ours("auto"), "official": tail.official(SegmentAnything(tail.model, path))}
        records = {name: form() for name, form in forms.items()}
        same = sum(a["segmentation"] == b["segmentation"] for a, b in zip(*records.values(), strict=True))
        seconds = {name: statistics.median(_seconds(form) for _ in range(repeats)) for name, form in forms.items()}
        ratio = seconds["official"] / seconds["ours"]
        rows.append({"size": size, "masks": len(records["ours"]), "equal": same, **seconds, "times faster": ratio})
    return rows


def _seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def resident_growth(run: Run) -> int:
    """Measure the most bytes that ``run`` added to this process, its result included. Linux only."""

    def status(name: str) -> int:
        match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert match is not None
        return 1024 * int(match[1])

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def memory_of(form: str, path: str) -> int:
    model, image, known = random_vit_b(), image_of((3000, 4000)), Discs()
    if form == "ours":
        return resident_growth(ours(model, known, image, MAX_MEMORY))
    package = import_segment_anything(path)
    _, run = official(package, official_copy(package, model), known, image, batches=1)
    return resident_growth(run)


def compare_memory(path: str) -> dict[str, Any]:
    peaks = {}
    for form in ("ours", "official"):
        command = [sys.executable, "-m", "benchmarks.generate", form, "--segment-anything", path]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[form] = int(done.stdout)
    return {"max_memory": MAX_MEMORY, "GB": {form: size / 1e9 for form, size in peaks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    parser.add_argument(
        "what", choices=("time", "memory", "tail", "ours", "official"), help="the last two: memory of one"
    )
    parser.add_argument("--segment-anything", default="", metavar="PATH", help="folder of the package")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of ours")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with torch.no_grad():
        if args.what in ("ours", "official"):
            print(memory_of(args.what, args.segment_anything))
        elif args.what == "memory":
            print(json.dumps(compare_memory(args.segment_anything)))
        elif args.what == "tail":
            print(json.dumps(compare_tails(args.segment_anything, args.repeats)))
        else:
            print(json.dumps(compare_times(args.segment_anything, args.dtype, args.repeats)))


if __name__ == "__main__":
    main()
