"""Photographs one after another, a click on each: reading ahead and copying beside the computation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import sam
from sam import Prompt
from sam.images.geometry import ImageGeometry
from sam.images.prepare import resize_image

from ..case import Case, Problem
from ..measure import Form, Work
from ..peers import chosen_peers
from .encoder import encoder_work, random_model

_SIZES = ((1500, 2250), (2250, 1500))
_CLICK = (700.0, 600.0)


def _case(variant: str, count: int) -> Callable[[torch.device, torch.dtype], Problem]:
    """Measure three masks per image on the host; the first is held by its low-resolution logits."""

    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        model = random_model(device, variant).to(dtype)
        rng = np.random.default_rng(0)
        images = [
            np.repeat(np.repeat(rng.integers(0, 256, (h // 10, w // 10, 3), np.uint8), 10, 0), 10, 1)
            for h, w in (_SIZES[index % 2] for index in range(count))
        ]
        prompts = [Prompt([_CLICK], [1])]

        def one_by_one(kernels: str) -> Form:
            def form() -> Tensor:
                model.kernels = kernels
                logits = []
                for image in images:
                    prediction = model.predict(model.encode(image), prompts)
                    prediction.masks.cpu()
                    logits.append(prediction.low_res_logits.cpu())
                return torch.cat(logits)

            return form

        def streamed(kernels: str) -> Form:
            def form() -> Tensor:
                model.kernels = kernels
                requests = ((image, prompts) for image in images)
                return torch.cat([result.low_res_logits for result in sam.predict_stream(model, requests)])

            return form

        def theirs(encode: Callable[[Tensor], Tensor], predict: Callable[..., tuple[Tensor, Tensor]]) -> Form:
            def form() -> Tensor:
                logits = []
                for image in images:
                    geometry = ImageGeometry.longest_side(*image.shape[:2], 1024)
                    resized = resize_image(image, geometry.input_size)
                    pixels = model.preprocess(torch.from_numpy(resized).to(device).permute(2, 0, 1))[None]
                    coords = torch.tensor([[_CLICK]], device=device) * torch.tensor(geometry.scale, device=device)
                    labels = torch.ones(1, 1, dtype=torch.int64, device=device)
                    low_res, _ = predict(encode(pixels), coords, labels, geometry.input_size)
                    logits.append(low_res.cpu())
                return torch.cat(logits)

            return form

        def truth() -> Tensor:
            exact = copy.deepcopy(model).double()
            exact.kernels = "torch"
            return exact.predict(exact.encode(images[0]), prompts).low_res_logits.cpu()

        forms = {
            "reference": one_by_one("reference"),
            "torch": one_by_one("torch"),
            "torch, stream": streamed("torch"),
        }
        if device.type == "cuda":
            forms |= {"triton": one_by_one("triton"), "triton, stream": streamed("triton")}
        for name, peer in chosen_peers(model).items():
            forms[name] = theirs(peer.encode, peer.predict)
        work = encoder_work(model, count, next(model.parameters()).element_size())
        return Problem(forms, truth, [0], Work(work.bytes, work.flops, work.scalar_ops), compile=False)

    return make


CASES = [
    Case("stream of 2 photographs, vit_b, a click each", _case("vit_b", 2), devices=("cpu",), runs=3, late=True),
    Case("stream of 64 photographs, vit_b, a click each", _case("vit_b", 64), devices=("cuda",), runs=3, late=True),
    Case("stream of 64 photographs, vit_h, a click each", _case("vit_h", 64), devices=("cuda",), runs=3, late=True),
]
