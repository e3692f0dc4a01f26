"""``demo``: the embedded model on three photographs that come with scikit-image."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..embedding import ImageEmbedding
from ..masks.overlay import draw_overlay
from ..modeling.promptable import PromptableModel
from ..prompts.prompt import Prompt
from ..system.atomic_write import write_atomically
from .model import model_from

_COINS = [(44, 54), (101, 57), (341, 43), (211, 192), (171, 262), (345, 189)]
_CUP, _SPOON = (290, 215), (365, 285)
_CAT_EYES = [(135, 85, 208, 148), (290, 108, 343, 165)]


def run(args: argparse.Namespace) -> None:
    """Segment three photographs, print a table and draw the masks."""
    try:
        from skimage import data
    except ImportError:
        raise ImportError("the demo's photographs are in scikit-image: pip install 'fastsam-kernels[demo]'") from None
    model = model_from(args)
    table = _Table(model, Path(args.out))
    table.print_header()

    coins = np.repeat(data.coins()[:, :, None], 3, axis=2)
    embedding = table.encode("coins", coins)
    table.predict("coins", embedding, coins, "six clicks in one call", [Prompt([xy], [1]) for xy in _COINS])

    coffee = data.coffee()
    embedding = table.encode("coffee", coffee)
    low_res = table.predict("coffee_click", embedding, coffee, "a click on the cup", [Prompt([_CUP], [1])])
    corrected = Prompt([_CUP, _SPOON], [1, 0], mask_input=low_res)
    table.predict("coffee_correction", embedding, coffee, "a second: not the spoon", [corrected], single=True)

    chelsea = data.chelsea()
    embedding = table.encode("chelsea", chelsea)
    table.predict("chelsea", embedding, chelsea, "boxes on the cat's eyes", [Prompt(box=box) for box in _CAT_EYES])
    print(f"\noverlays: {', '.join(str(path) for path in table.written)}")
    if args.checkpoint is None:
        print("nano is small and saw only drawn scenes: real use takes the official weights (--checkpoint FILE)")


class _Table:
    """A printed table with one row per request, and one overlay per answer."""

    def __init__(self, model: PromptableModel, out: Path) -> None:
        self.model, self.out = model, out
        self.written: list[Path] = []
        out.mkdir(parents=True, exist_ok=True)

    def print_header(self) -> None:
        model = self.model
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{model.name}, {millions:.1f} M parameters, {model.image_size} px input; device "
            f"{model.device}, {str(model.dtype).removeprefix('torch.')}, kernels {model.resolved_kernels}\n"
        )
        self._row("photo", "prompt", "ms", "predicted IoU", "of image")

    def encode(self, name: str, image: np.ndarray) -> ImageEmbedding:
        embedding, milliseconds = self._timed(lambda: self.model.encode(image))
        self._row(name, "(image embedding)", f"{milliseconds:.0f}")
        return embedding

    def predict(
        self,
        name: str,
        embedding: ImageEmbedding,
        image: np.ndarray,
        description: str,
        prompts: Sequence[Prompt],
        single: bool = False,
    ) -> np.ndarray:
        """Predict, print, draw; returns the last prompt's best low-resolution logits [1, h, w]."""
        prediction, milliseconds = self._timed(
            lambda: self.model.predict(embedding, prompts, multimask_output=not single)
        )
        rows, best = np.arange(len(prompts)), prediction.iou_predictions.argmax(dim=1).cpu().numpy()
        masks = prediction.masks.cpu().numpy()[rows, best]
        scores = prediction.iou_predictions.cpu().numpy()[rows, best]
        self._row("", description, f"{milliseconds:.0f}", f"{scores.mean():.3f}", f"{masks.any(axis=0).mean():.1%}")
        path = self.out / f"{name}.png"
        with write_atomically(path) as partial:
            draw_overlay(image, masks, prompts).save(partial)
        self.written.append(path)
        return prediction.low_res_logits[-1, best[-1]].cpu().numpy()[None]

    @staticmethod
    def _timed(action: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        result = action()
        return result, 1000 * (time.perf_counter() - start)

    @staticmethod
    def _row(photo: str, prompt: str, milliseconds: str, iou: str = "", share: str = "") -> None:
        print(f"{photo:<9}{prompt:<36}{milliseconds:>7}{iou:>15}{share:>10}")
