"""Other implementations of SAM, with the weights of ours, measured in the same run.

``--peers transformers,segment-anything=PATH`` chooses them; PATH is the folder from which ``import segment_anything``
works, a checkout of https://github.com/facebookresearch/segment-anything or an installation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sam
from sam import Sam

from .torchvision_stand_in import stand_in_for_torchvision


class Peer(Protocol):
    """The interface to another implementation; all run without gradients."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels [B, 3, size, size] to features [B, 256, grid, grid]."""
        ...

    def decode(self, features: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Decode P prompts of K points on one image to logits [P, 3, low, low] and predicted IoU [P, 3].

        Features are [1, 256, grid, grid], coords [P, K, 2] in pixels of the model's input, labels [P, K].
        """
        ...

    def predict(
        self,
        features: Tensor,
        coords: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        mask_inputs: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Decode as ``decode`` does, to boolean masks of an image of ``size`` that fills the model's input.

        With mask inputs [P, 1, low, low], and one mask a prompt, if wanted.
        """
        ...


class SegmentAnything:
    """Meta's package, imported from a folder; in 16 bits under autocast, as its prompt encoder takes fp32 only."""

    def __init__(self, model: Sam, path: str) -> None:
        self.package = import_segment_anything(path)
        self.model = official_copy(self.package, model).float()
        self._autocast = functools.partial(
            torch.autocast, model.device.type, model.dtype, enabled=model.dtype in (torch.float16, torch.bfloat16)
        )

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def encode(self, pixels: Tensor) -> Tensor:
        with self._autocast():
            return self.model.image_encoder(pixels.to(self._dtype))

    def decode(self, features: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return self._decode(features.to(self._dtype), coords, labels)

    def _decode(self, features: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sparse, dense = self.model.prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        return self.model.mask_decoder(
            image_embeddings=features,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )

    def predict(
        self,
        features: Tensor,
        coords: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        mask_inputs: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]:
        predictor = self.package.SamPredictor(self.model)
        predictor.features, predictor.is_image_set = features.to(self._dtype), True
        predictor.original_size, predictor.input_size = size, size
        with self._autocast():
            _, iou, low_res = predictor.predict_torch(
                coords, labels, mask_input=mask_inputs, multimask_output=multimask
            )
        return low_res, iou


class SegmentAnythingFast(SegmentAnything):
    """Meta's faster copy, which takes 16 bits; on a GPU its encoder is compiled as its own registry does it."""

    def __init__(self, model: Sam, path: str) -> None:
        self.package = _import_from(path, "segment_anything_fast")
        self.model = official_copy(self.package, model)
        self._autocast = contextlib.nullcontext
        if model.device.type == "cuda":
            self.model.image_encoder = torch.compile(self.model.image_encoder, mode="max-autotune")


class Transformers:
    """``transformers.SamModel`` with its default attention."""

    def __init__(self, model: Sam, path: str) -> None:
        if path:
            raise ValueError(f"the peer transformers takes no path, got {path!r}")
        from transformers import SamModel

        with tempfile.TemporaryDirectory() as folder:
            sam.save_checkpoint(model, folder, layout="transformers")
            self.model = SamModel.from_pretrained(folder, dtype=model.dtype).eval().requires_grad_(False)
        self.model.to(model.device)
        for layer in self.model.mask_decoder.transformer.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.eps = 1e-5  # the official value; the port has 1e-6 in some, which moves logits by 1e-4

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_embeddings(pixels)

    def decode(
        self,
        features: Tensor,
        coords: Tensor,
        labels: Tensor,
        mask_inputs: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]:
        out = self.model(
            image_embeddings=features,
            input_points=coords[None],
            input_labels=labels[None],
            input_masks=mask_inputs,
            multimask_output=multimask,
        )
        return out.pred_masks[0], out.iou_scores[0]

    def predict(
        self,
        features: Tensor,
        coords: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        mask_inputs: Tensor | None = None,
        multimask: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Predict the masks as its image processor makes them."""
        low_res, iou = self.decode(features, coords, labels, mask_inputs, multimask)
        square = (self.model.config.vision_config.image_size,) * 2
        enlarged = F.interpolate(low_res, square, mode="bilinear", align_corners=False)
        _ = F.interpolate(enlarged[..., : size[0], : size[1]], size, mode="bilinear", align_corners=False) > 0
        return low_res, iou


PEERS: dict[str, Callable[[Sam, str], Peer]] = {
    "segment-anything": SegmentAnything,
    "segment-anything-fast": SegmentAnythingFast,
    "transformers": Transformers,
}
SAM2 = "sam2"
_chosen: dict[str, str] = {}


def choose_peers(text: str, compiled: bool = True) -> None:
    """Take the value of ``--peers``: names, each with ``=PATH`` where it needs one, between commas.

    Raises:
        ValueError: an unknown name, a path that does not exist, or a peer that compiles without ``compiled``.
    """
    _chosen.clear()
    for part in filter(None, text.split(",")):
        name, _, path = part.partition("=")
        if name not in PEERS and name != SAM2:
            raise ValueError(f"unknown peer {name!r}; known: {', '.join((*PEERS, SAM2))}")
        if PEERS.get(name) is SegmentAnythingFast and not compiled:
            raise ValueError(f"the peer {name} compiles its encoder: not with --no-compile")
        if path and not Path(path).is_dir():
            raise ValueError(f"the peer {name} is to come from {path}, which is no folder")
        _chosen[name] = path


def chosen_peers(model: Sam) -> dict[str, Peer]:
    """Return the peers of this run by name, with the weights, device and dtype of ``model``."""
    return {name: PEERS[name](model, path) for name, path in _chosen.items() if name != SAM2}


def sam2_path() -> str | None:
    """Return the folder of Meta's SAM 2, the peer of SAM 2's models; None where it was not chosen."""
    return _chosen.get(SAM2)


def transformers_chosen() -> bool:
    """Return whether transformers is a peer of this run."""
    return "transformers" in _chosen


def import_segment_anything(path: str) -> Any:
    """Import the official package as it stands in the folder ``path``; "" takes the installed one."""
    return _import_from(path, "segment_anything")


def _import_from(path: str, package: str) -> Any:
    if path and path not in sys.path:
        sys.path.insert(0, path)
    stand_in_for_torchvision()
    return importlib.import_module(package)


def official_copy(package: Any, model: Sam) -> nn.Module:
    """Return the official ``Sam`` with the weights of ours, any size."""
    config = model.config
    if config is None:
        raise ValueError("the model has no config")
    modeling, grid = package.modeling, config.grid_size
    encoder = modeling.ImageEncoderViT(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.encoder_embed_dim,
        depth=config.encoder_depth,
        num_heads=config.encoder_num_heads,
        mlp_ratio=config.mlp_ratio,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=config.global_attn_indexes,
        window_size=config.window_size,
        out_chans=config.prompt_embed_dim,
    )
    prompt_encoder = modeling.PromptEncoder(
        embed_dim=config.prompt_embed_dim,
        image_embedding_size=(grid, grid),
        input_image_size=(config.image_size, config.image_size),
        mask_in_chans=config.mask_in_chans,
    )
    mask_decoder = modeling.MaskDecoder(
        num_multimask_outputs=config.num_multimask_outputs,
        transformer=modeling.TwoWayTransformer(
            depth=config.decoder_depth,
            embedding_dim=config.prompt_embed_dim,
            mlp_dim=config.decoder_mlp_dim,
            num_heads=config.decoder_num_heads,
        ),
        transformer_dim=config.prompt_embed_dim,
        iou_head_depth=config.iou_head_depth,
        iou_head_hidden_dim=config.iou_head_hidden_dim,
    )
    official = modeling.Sam(encoder, prompt_encoder, mask_decoder, list(config.pixel_mean), list(config.pixel_std))
    official.load_state_dict(model.state_dict())
    return official.eval().requires_grad_(False).to(model.device, model.dtype)
