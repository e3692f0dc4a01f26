"""SAM 2 of every size at 1024 px beside Meta's, with the same weights: relative L2 errors of embedding, logits and IoU.

    python -m benchmarks.official_sam2_sizes --sam2 PATH [--variant sam2.1_tiny ...]

PATH is as of :mod:`benchmarks.official_sam2`. An error over its limit fails the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastsam_kernels.numerics import relative_error
from sam.config import SAM2_VARIANTS
from sam.embedding import ImageEmbedding
from sam.images.geometry import ImageGeometry
from sam.modeling.sam2_base import SAM2Base
from sam.prompts.batch import PromptBatch

from .official_sam2 import official_model, random_sam2

SIZE, PROMPTS = 1024, 4
LIMITS = {"s0": 2e-5, "s1": 2e-5, "embedding": 2e-5, "low_res": 2e-4, "iou": 1e-4, "score": 1e-4}
KINDS = ("points", "boxes", "points and boxes", "masks", "points, boxes and masks", "nothing")
Maps = tuple[Tensor, Tensor, Tensor]
Answer = tuple[Tensor, Tensor, Tensor]
Prompt = tuple[tuple[Tensor, Tensor], Tensor | None]
Decode = Callable[[Maps, Prompt, bool], Answer]


def pixels() -> Tensor:
    """Return a normalised image [1, 3, SIZE, SIZE]: noise, and squares of other colours."""
    image = 0.5 * torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        image[:, step % 3, 100 + 200 * step : 400 + 150 * step, 90 + 180 * step : 300 + 200 * step] += 2
    return image


def prompts(kind: str) -> Prompt:
    """Return points, with corners of boxes as labels 2 and 3, and mask inputs of PROMPTS prompts of a kind."""
    generator = torch.Generator().manual_seed(1)
    corners = SIZE * torch.tensor([0.1, 0.6]) + 0.3 * SIZE * torch.rand(PROMPTS, 2, 2, generator=generator)
    clicks = SIZE * torch.rand(PROMPTS, 2, 2, generator=generator)
    masks = 4 * torch.randn(PROMPTS, 1, SIZE // 4, SIZE // 4, generator=generator)
    nobody = torch.zeros(PROMPTS, 1, 2), [-1]  # as the official model says that nobody clicked
    known = {"boxes": (corners.sort(1).values, [2, 3]), "points": (clicks, [1, 0])}
    parts = [part for name, part in known.items() if name in kind]
    coords, labels = zip(*parts or [nobody], strict=True)
    points = torch.cat(coords, 1), torch.tensor([[*chain(*labels)]] * PROMPTS, dtype=torch.int32)
    return points, masks if "masks" in kind else None


@torch.inference_mode()
def official_maps(model: Any) -> Maps:
    """Return s0, s1 and the embedding of :func:`pixels` by the official methods."""
    s0, s1, features = model.forward_image(pixels())["backbone_fpn"]
    return s0, s1, features + model.no_mem_embed.view(1, -1, 1, 1)


def official_decode(model: Any) -> Decode:
    """Return a function of maps, a prompt and whether there are three masks, by the official modules."""

    @torch.inference_mode()
    def decode(maps: Maps, prompt: Prompt, multimask_output: bool) -> Answer:
        points, masks = prompt
        sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=masks)
        low_res, iou, _, scores = model.sam_mask_decoder(
            image_embeddings=maps[2],
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            repeat_image=True,
            high_res_features=[*maps[:2]],
        )
        return low_res, iou, scores[:, 0]

    return decode


@torch.inference_mode()
def our_maps(model: SAM2Base) -> Maps:
    features = model.image_features(pixels())
    return features.high_res[0], features.high_res[1], features.embedding


def our_decode(model: SAM2Base) -> Decode:
    """Return what :func:`official_decode` does, of our model's own entry."""

    @torch.inference_mode()
    def decode(maps: Maps, prompt: Prompt, multimask_output: bool) -> Answer:
        points, masks = prompt
        embedding = ImageEmbedding(maps[2], ImageGeometry.stretched(SIZE, SIZE, SIZE), high_res=maps[:2])
        batch = PromptBatch.from_tensors(points, None, masks, model.device, model.prompt_layout)
        decoded = model.decode([embedding], batch, multimask_output)
        assert decoded.object_scores is not None
        return decoded.logits, decoded.iou, decoded.object_scores

    return decode


def median_stability(model: SAM2Base, maps: Maps) -> float:
    """Return a threshold of stability that half of the single masks reach."""
    decoder = model.sam_mask_decoder
    kept, decoder.dynamic_multimask_via_stability = decoder.dynamic_multimask_via_stability, False
    logits = torch.cat([our_decode(model)(maps, prompts(kind), False)[0] for kind in KINDS])
    decoder.dynamic_multimask_via_stability = kept
    stability = decoder._get_stability_scores(logits).flatten().sort().values
    middle = len(stability) // 2
    return float(stability[middle - 1 : middle + 1].mean())


def errors(ours: tuple[Maps, Decode], theirs: tuple[Maps, Decode]) -> dict[str, float]:
    """Return the largest error of each of LIMITS, prompts of every kind decoded from the maps of each side's own."""
    (our_levels, our_answers), (their_levels, their_answers) = ours, theirs
    names = ("s0", "s1", "embedding")
    found = {name: relative_error(a, b) for name, a, b in zip(names, our_levels, their_levels, strict=True)}
    for kind in KINDS:
        for multimask_output in (True, False):
            pairs = zip(
                our_answers(our_levels, prompts(kind), multimask_output),
                their_answers(their_levels, prompts(kind), multimask_output),
                strict=True,
            )
            for name, (a, b) in zip(("low_res", "iou", "score"), pairs, strict=True):
                if a.shape != b.shape:
                    raise ValueError(f"{name} of {kind}: {list(a.shape)} against {list(b.shape)}")
                found[name] = max(found.get(name, 0.0), relative_error(a, b))
    return found


def compare(path: str, variant: str) -> dict[str, float]:
    """Return the errors of a variant against Meta's package in the folder ``path``."""
    model = random_sam2(variant, SIZE)
    levels = our_maps(model)
    threshold = median_stability(model, levels)
    official: Any = official_model(path, variant, SIZE)
    official.load_state_dict(model.state_dict())
    for decoder in (model.sam_mask_decoder, official.sam_mask_decoder):
        decoder.dynamic_multimask_stability_thresh = threshold
    return errors((levels, our_decode(model)), (official_maps(official), official_decode(official)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam2", required=True, metavar="PATH", help="folder from which import sam2 works")
    parser.add_argument("--variant", action="append", choices=SAM2_VARIANTS, help="(default: all); may be repeated")
    args = parser.parse_args()
    print("| |", " | ".join(LIMITS), "|\n|---|", "---:|" * len(LIMITS))
    print("| at most |", " | ".join(f"{limit:.0e}" for limit in LIMITS.values()), "|")
    good = True
    for variant in args.variant or SAM2_VARIANTS:
        found = compare(args.sam2, variant)
        good &= all(found[name] <= limit for name, limit in LIMITS.items())
        print(f"| {variant} |", " | ".join(f"{found[name]:.1e}" for name in LIMITS), "|", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
