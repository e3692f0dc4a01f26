"""Calls that programs make of Meta's package, with its answers written down for the tests.

    python -m benchmarks.official_calls --segment-anything PATH

PATH is the folder from which ``import segment_anything`` works. To be run again when a call is added or the embedded
weights change; it takes a minute. ``tests/test_programs.py`` makes the same calls of this package.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sam

from .official_masks import package_version
from .peers import import_segment_anything, official_copy

TARGET = Path(__file__).parents[1] / "tests" / "official_calls.json"
SAMPLES = 24

Answers = dict[str, dict[str, Tensor]]
Encode = Callable[[Any, Tensor], Tensor]


def summary(answer: Tensor | np.ndarray) -> dict[str, Any]:
    """Describe an answer by its shape, its norm and values at places spread over it."""
    values = torch.as_tensor(answer).detach().double()
    flat = values.flatten()
    positions = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).round().long()
    return {
        "shape": list(values.shape),
        "norm": float(f"{float(flat.norm()):.7g}"),
        "samples": [float(f"{value:.6g}") for value in flat[positions].tolist()],
    }


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draw normal numbers that are the same everywhere."""
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal(shape)).float()


# The image encoder ------------------------------------------------------------------------------------------


def small_encoder(modeling: Any, **changes: Any) -> Any:
    """Build an encoder whose windows do not divide its grid of 8 x 8, with a global block, every weight drawn."""
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    sizes |= {"out_chans": 16, "use_rel_pos": True, "window_size": 3, "global_attn_indexes": (1,)}
    encoder = modeling.ImageEncoderViT(**(sizes | changes)).requires_grad_(False)
    for seed, (name, parameter) in enumerate(encoder.named_parameters()):
        of_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(float(of_norm) + numbers(*parameter.shape, seed=seed, scale=0.1))
    return encoder


class LoraQkv(nn.Module):
    """LoRA of q and v as SAMed writes it: added in place to slices of four indices."""

    def __init__(self, qkv: nn.Linear, scale: float = 1.0) -> None:
        super().__init__()
        self.qkv, self.dim, self.scale = qkv, qkv.in_features, scale
        self.down_q, self.up_q, self.down_v, self.up_v = (
            nn.Parameter(numbers(*shape, seed=seed, scale=0.3))
            for seed, shape in enumerate([(self.dim, 2), (2, self.dim)] * 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        qkv[:, :, :, : self.dim] += self.scale * (x @ self.down_q @ self.up_q)
        qkv[:, :, :, -self.dim :] += self.scale * (x @ self.down_v @ self.up_v)
        return qkv


class LoraLinear(nn.Module):
    """LoRA of a whole linear as peft writes it; takes any number of axes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(numbers(base.in_features, 2, seed=5, scale=0.3))
        self.up = nn.Parameter(numbers(2, base.out_features, seed=6, scale=0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * (x @ self.down @ self.up)


class GridLinear(LoraLinear):
    """LoRA that insists on [B, H, W, C], and depends on where in it a token is."""

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        y = self.base(x)
        y[:, :, :, :4] += (x @ self.down @ self.up)[:, :, :, :4]
        return y + torch.linspace(0, 1, height * width, dtype=x.dtype).view(1, height, width, 1)


class Biased(nn.Linear):
    """A subclass of Linear whose output at zero is not its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5

    @classmethod
    def of(cls, linear: nn.Linear) -> Biased:
        made = cls(linear.in_features, linear.out_features)
        made.load_state_dict(linear.state_dict())
        return made


class GridNorm(nn.Module):
    """A norm that insists on [B, H, W, C] and looks at a whole grid."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + x.mean(dim=(1, 2), keepdim=True)


STAND_INS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "SAMed": ("attn.qkv", LoraQkv),
    "micro-sam": ("attn.qkv", lambda qkv: LoraQkv(qkv, scale=0.5)),
    "peft, qkv": ("attn.qkv", LoraLinear),
    "peft, proj": ("attn.proj", LoraLinear),
    "peft, lin1": ("mlp.lin1", LoraLinear),
    "grid, qkv": ("attn.qkv", GridLinear),
    "grid, proj": ("attn.proj", GridLinear),
    "grid, lin1": ("mlp.lin1", GridLinear),
    "grid, lin2": ("mlp.lin2", GridLinear),
    "grid, norm2": ("norm2", GridNorm),
    "subclass of Linear": ("attn.qkv", Biased.of),
}


def put(encoder: nn.Module, name: str) -> None:
    """Put the stand-in called ``name`` into every block."""
    place, make = STAND_INS[name]
    for block in encoder.blocks:  # type: ignore[union-attr]
        path, _, leaf = place.rpartition(".")
        owner = block.get_submodule(path)
        setattr(owner, leaf, make(getattr(owner, leaf)))


def adapted(modeling: Any, name: str, encode: Encode) -> dict[str, Tensor]:
    """Return features and gradients of an encoder with a stand-in."""
    encoder = small_encoder(modeling)
    put(encoder, name)
    pixels = numbers(2, 3, 64, 64, seed=100)
    with torch.no_grad():
        answers = {"features": encode(encoder, pixels)}
    learned = {key: weight for key, weight in encoder.named_parameters() if weight.requires_grad}
    if learned:
        encoder.train()
        encode(encoder, pixels).square().sum().backward()
        answers |= {key: weight.grad for key, weight in learned.items() if "blocks.0" in key}  # type: ignore[misc]
    return answers


def of_another_size(modeling: Any, size: tuple[int, int], encode: Encode) -> dict[str, Tensor]:
    """Encode images that are not ``img_size`` pixels, by an encoder without absolute positions."""
    encoder = small_encoder(modeling, use_abs_pos=False)
    return {"features": encode(encoder, numbers(2, 3, *size, seed=101))}


def with_positions_of_another_size(modeling: Any, encode: Encode) -> dict[str, Tensor]:
    """Encode smaller images, positions resized by hand and ``img_size`` left as it was."""
    encoder = small_encoder(modeling)
    resized = nn.functional.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), (5, 6), mode="bilinear")
    encoder.pos_embed = nn.Parameter(resized.permute(0, 2, 3, 1), requires_grad=False)
    return {"features": encode(encoder, numbers(1, 3, 40, 48, seed=102))}


OTHER_SIZES = ((40, 40), (96, 96), (40, 72), (8, 64), (61, 50))


def encoder_calls(modeling: Any, encode: Encode = lambda encoder, pixels: encoder(pixels)) -> Answers:
    """Call the small encoder; ``options`` are those of its forward after the pixels."""
    calls = {f"stand-in, {name}": adapted(modeling, name, encode) for name in STAND_INS}
    calls |= {f"size {size}": of_another_size(modeling, size, encode) for size in OTHER_SIZES}
    return calls | {"positions of another size": with_positions_of_another_size(modeling, encode)}


# The mask decoder -------------------------------------------------------------------------------------------

# Rows of image, positions, sparse and dense that the official decoder takes together.
ROWS = ((3, 1, 1, 1), (3, 3, 1, 1), (1, 1, 1, 3), (3, 1, 1, 3), (1, 1, 3, 1), (1, 1, 3, 3))


def decoder_calls(model: Any) -> dict[str, dict[str, Tensor]]:
    """Call the mask decoder with inputs of several numbers of rows, and take a gradient through it."""
    encoder, pe = model.prompt_encoder, model.prompt_encoder.get_dense_pe()
    height, width = pe.shape[-2:]
    calls = {}
    for images, positions, sparse, dense in ROWS:
        masks, iou = model.mask_decoder(
            image_embeddings=numbers(images, 256, height, width, seed=200, scale=0.3),
            image_pe=pe + numbers(positions, 1, 1, 1, seed=204),
            sparse_prompt_embeddings=numbers(sparse, 2, 256, seed=201),
            dense_prompt_embeddings=numbers(dense, 256, height, width, seed=202, scale=0.3),
            multimask_output=True,
        )
        calls[f"rows {images} {positions} {sparse} {dense}"] = {"masks": masks, "iou": iou}
    nothing, no_mask = encoder(points=None, boxes=None, masks=None)
    features = numbers(2, 256, height, width, seed=203, scale=0.3)
    with torch.enable_grad():
        masks, iou = model.mask_decoder(features.requires_grad_(), pe, nothing, no_mask, multimask_output=False)
        (gradient,) = torch.autograd.grad(masks.square().mean(), features)
    calls["no prompt on two images"] = {"masks": masks, "iou": iou, "gradient": gradient}
    return calls


# The predictor ----------------------------------------------------------------------------------------------


def pixels(*shape: int, seed: int = 300) -> np.ndarray:
    """Draw pixels of uint8 that are the same everywhere."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read_only(image: np.ndarray) -> np.ndarray:
    """Return an array that cannot be written."""
    image.flags.writeable = False
    return image


# Images that ``ResizeLongestSide.apply_image`` takes officially; plt.imread of a PNG gives the floating-point ones.
IMAGES: dict[str, np.ndarray] = {
    "uint8": pixels(30, 40, 3),
    "float64": pixels(30, 40, 3) / 255,
    "float32": (pixels(30, 40, 3) / 255).astype(np.float32),
    "float16": (pixels(30, 40, 3) / 255).astype(np.float16),
    "float32 with alpha": (pixels(30, 40, 4) / 255).astype(np.float32),
    "a little over 1": np.full((30, 40, 3), 1.001),
    "a little under 0": np.full((30, 40, 3), -1e-4),
    "grey": pixels(30, 40),
    "grey, float": pixels(30, 40) / 255,
    "grey, float, one channel": pixels(30, 40, 1) / 255,
    "grey with alpha": pixels(30, 40, 2),
    "with alpha": pixels(30, 40, 4),
    "grey, int32": pixels(30, 40).astype(np.int32) * 300,
    "grey, int16": pixels(30, 40).astype(np.int16) * 100,
    "not contiguous": pixels(60, 40, 6)[::2, :, ::-2],
    "Fortran order": np.asfortranarray(pixels(30, 40, 3)),
    "read-only": read_only(pixels(30, 40, 3)),
}


def predictor_calls(package: Any, model: Any) -> dict[str, dict[str, Any]]:
    """Call the predictor and its transform with images as programs have them."""
    transforms = importlib.import_module(f"{package.__name__}.utils.transforms")
    transform = transforms.ResizeLongestSide(64)
    calls: dict[str, dict[str, Any]] = {
        f"apply_image, {name}": {"pixels": transform.apply_image(image)} for name, image in IMAGES.items()
    }
    predictor = package.SamPredictor(model)
    predictor.set_image(IMAGES["float32"])
    calls["set_image of floating point"] = {"features": predictor.features}
    square = nn.functional.pad(torch.from_numpy(pixels(1, 3, 341, 512)).float(), (0, 0, 0, 171))
    predictor.set_torch_image(square, (400, 600))
    for name, prompt in {
        "point": {"point_coords": np.array([[250.0, 300.0]]), "point_labels": np.array([1])},
        "box": {"box": np.array([40.0, 210.0, 350.0, 390.0])},
    }.items():
        masks, iou, low_res = predictor.predict(**prompt, return_logits=True)
        calls[f"padded square, {name}"] = {"masks": masks, "iou": iou, "low_res": low_res}
    logits = numbers(1, 2, 128, 128, seed=301)
    for size in ((512, 512), (600, 900), (300, 900)):
        calls[f"postprocess_masks, {size}"] = {"masks": model.postprocess_masks(logits, size, (50, 70))}
    return calls


def smaller_by_hand(package: Any, model: Any) -> dict[str, Any]:
    """Make a model smaller by its attributes, twice, and call it after each change."""
    model = copy.deepcopy(model)
    encoder, prompt_encoder, image = model.image_encoder, model.prompt_encoder, pixels(60, 80, 3)
    click = {"point_coords": np.array([[30.0, 20.0]]), "point_labels": np.array([1]), "return_logits": True}
    for size in (512, 256):
        grid = size // 16
        resized = nn.functional.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), (grid, grid), mode="bilinear")
        encoder.pos_embed = nn.Parameter(resized.permute(0, 2, 3, 1), requires_grad=False)
        encoder.img_size, prompt_encoder.image_embedding_size = size, (grid, grid)
        prompt_encoder.input_image_size, prompt_encoder.mask_input_size = (size, size), (4 * grid, 4 * grid)
        predictor = package.SamPredictor(model)
        predictor.set_image(image)
        masks, iou, low_res = predictor.predict(**click)
        again, _, _ = predictor.predict(**click, mask_input=low_res[:1])
    return {"masks": masks, "iou": iou, "low_res": low_res, "refined": again}


def all_calls(package: Any, model: Any) -> dict[str, dict[str, Any]]:
    """Make every call of a package, ``sam`` or ``segment_anything``, with a model of it that has nano's weights."""
    modeling = importlib.import_module(f"{package.__name__}.modeling")
    calls = encoder_calls(modeling)
    with torch.no_grad():
        calls |= decoder_calls(model)
        calls |= predictor_calls(package, model)
        calls["smaller by hand"] = smaller_by_hand(package, model)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.official_calls", description=__doc__)
    parser.add_argument("--segment-anything", default="", metavar="PATH", help="folder of the package")
    package = import_segment_anything(parser.parse_args().segment_anything)
    ours = sam.load_model(device="cpu")
    calls = all_calls(package, official_copy(package, ours))
    lines = [
        f"{json.dumps(call)}: {json.dumps({name: summary(answer) for name, answer in answers.items()})}"
        for call, answers in calls.items()
    ]
    head = {"package": package_version(), "model_hash": ours.model_hash}
    TARGET.write_text(json.dumps(head)[:-1] + ', "calls": {\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
