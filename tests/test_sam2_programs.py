"""Programs around ``sam2`` on images, beyond its documented calls: exporters, other trunks, adapters, trainers."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from comparison import assert_close_l2
from models import SMALL_2, random_image, random_model, randomise
from torch import Tensor, nn

import sam
from sam.sam2 import build_sam
from sam.sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam.sam2.sam2_image_predictor import SAM2ImagePredictor
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor

SMALL = replace(SMALL_2, dynamic_multimask_via_stability=True)
IMAGE = random_image(60, 90)
CLICKS, LABELS = np.array([[30, 20], [80, 50], [5, 5]]), np.array([1, 0, 1])
ALL = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


@pytest.fixture
def model() -> sam.SAM2Base:
    return random_model(SMALL)


def pixels_of(model: Any, count: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *[model.image_size] * 2, generator=torch.Generator().manual_seed(seed))


# Exporters -------------------------------------------------------------------------------------------------------


class EncoderToExport(nn.Module):
    """Takes 256 channels at three levels from the image encoder, and projects the finer two itself, in place."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        out = model.image_encoder(pixels)
        maps = out["backbone_fpn"]
        maps[0] = model.sam_mask_decoder.conv_s0(maps[0])
        maps[1] = model.sam_mask_decoder.conv_s1(maps[1])
        levels = [level.flatten(2).permute(2, 0, 1) for level in maps[-model.num_feature_levels :]]
        levels[-1] = levels[-1] + model.no_mem_embed
        positions = out["vision_pos_enc"][-model.num_feature_levels :]
        return tuple(
            level.permute(1, 2, 0).reshape(1, -1, *place.shape[-2:])
            for level, place in zip(levels, positions, strict=True)
        )


class DecoderToExport(nn.Module):
    """Encodes points by the parts of the prompt encoder and calls what is inside of the mask decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.prompts, self.side = model.sam_mask_decoder, model.sam_prompt_encoder, model.image_size

    def tokens(self, coords: Tensor, labels: Tensor) -> Tensor:
        prompts = self.prompts
        coords = torch.cat([coords + 0.5, torch.zeros_like(coords[:, :1])], dim=1) / self.side
        labels = torch.cat([labels, -torch.ones_like(labels[:, :1])], dim=1)[..., None]
        tokens = prompts.pe_layer._pe_encoding(coords)
        tokens = tokens * (labels != -1) + prompts.not_a_point_embed.weight * (labels == -1)
        for label in range(prompts.num_point_embeddings):
            tokens = tokens + prompts.point_embeddings[label].weight * (labels == label)
        return tokens

    def forward(
        self, embedding: Tensor, s0: Tensor, s1: Tensor, coords: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor
    ) -> tuple[Tensor, ...]:
        prompts = self.prompts
        without = prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
        masks, iou, _, _ = self.decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=prompts.get_dense_pe(),
            sparse_prompt_embeddings=self.tokens(coords, labels),
            dense_prompt_embeddings=has_mask * prompts.mask_downscaling(mask) + (1 - has_mask) * without,
            repeat_image=False,
            high_res_features=[s0, s1],
        )
        return masks[:, 1:], iou[:, 1:], *self.decoder._dynamic_multimask_via_stability(masks, iou)


@pytest.mark.parametrize("traced", [False, True])
def test_an_encoder_to_export(model: sam.SAM2Base, traced: bool) -> None:
    export: Any = EncoderToExport(model).eval()
    with torch.no_grad():
        raw = model.image_encoder(pixels_of(model))
        assert [x.shape[1] for x in raw["backbone_fpn"]] == [64] * 3  # 256 of released models
        assert len(raw["vision_pos_enc"]) == 3
        if traced:
            export = torch.jit.trace(export, pixels_of(model, seed=1), check_trace=False)
        s0, s1, embedding = export(pixels_of(model))
        features = model.image_features(pixels_of(model))
    for name, made, ours in zip(
        ("s0", "s1", "embedding"), (s0, s1, embedding), (*features.high_res, features.embedding), strict=True
    ):
        assert_close_l2(made, ours, 1e-5, name)


@pytest.mark.parametrize("threshold", [0.0, 1.1])  # the single mask stays, or gives way
@pytest.mark.parametrize("traced", [False, True])
def test_a_decoder_to_export(model: sam.SAM2Base, traced: bool, threshold: float) -> None:
    """It answers as the predictor does, three masks and one, with a mask input and without."""
    model.sam_mask_decoder.dynamic_multimask_stability_thresh = threshold
    predictor = SAM2ImagePredictor(model)
    predictor.set_image(IMAGE)
    assert predictor._features is not None
    embedding, (s0, s1) = predictor._features["image_embed"], predictor._features["high_res_feats"]
    _, coords, labels, _ = predictor._prep_prompts(CLICKS, LABELS, None, None, True)
    assert coords is not None
    assert labels is not None
    mask = 3 * torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    export: Any = DecoderToExport(model).eval()
    with torch.no_grad():
        if traced:
            example = (torch.rand(1, 2, 2) * 60, torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1, 16, 16), torch.ones(1))
            export = torch.jit.trace(export, (embedding, s0, s1, *example), check_trace=False)
        for has_mask in (0.0, 1.0):
            results = export(embedding, s0, s1, coords, labels.float(), mask, torch.tensor([has_mask]))
            given = {"mask_input": mask[0].numpy()} if has_mask else {}
            for several, low_res, iou in ((True, *results[:2]), (False, *results[2:])):
                _, our_iou, our_low_res = predictor.predict(CLICKS, LABELS, multimask_output=several, **given)
                assert_close_l2(low_res[0].clamp(-32, 32), torch.from_numpy(our_low_res), 1e-5, f"logits, {several}")
                assert_close_l2(iou[0], torch.from_numpy(our_iou), 1e-5, f"IoU, {several}")


def test_an_export_by_hand_through_the_transforms(model: sam.SAM2Base) -> None:
    """Batches by ``transforms``, features by ``_prepare_backbone_features``, prompts and decoder by their modules."""
    predictor = SAM2ImagePredictor(model)
    predictor.set_image(IMAGE)
    expected = predictor.predict(CLICKS, LABELS)[2]
    batch = predictor._transforms.transforms(torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 255)
    with torch.no_grad():
        _, levels, _, _ = model._prepare_backbone_features(model.forward_image(batch))
        levels[-1] = levels[-1] + model.no_mem_embed
        maps = [
            level.permute(1, 2, 0).view(1, -1, *size)
            for level, size in zip(levels[::-1], predictor._bb_feat_sizes[::-1], strict=True)
        ][::-1]
        _, coords, labels, _ = predictor._prep_prompts(CLICKS, LABELS, None, None, True)
        assert coords is not None
        assert labels is not None
        sparse, dense = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        low_res, _, _, _ = model.sam_mask_decoder(
            image_embeddings=maps[-1],
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=False,
            high_res_features=maps[:-1],
        )
    assert_close_l2(low_res[0].clamp(-32, 32), torch.from_numpy(expected), 1e-5, "logits")


# Trunks of other models ------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """What is learned before a block, and the block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        width = block.attn.qkv.in_features
        self.block, self.learned = block, nn.Sequential(nn.Linear(width, 4), nn.GELU(), nn.Linear(4, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.learned(x))


def test_a_trunk_without_the_rest(model: sam.SAM2Base) -> None:
    """As U-Nets take it: all other parts and the neck deleted, each block in an adapter, another size."""
    with torch.no_grad():
        before = model.image_encoder.trunk(torch.rand(1, 3, 352, 352, generator=torch.Generator().manual_seed(0)))
    for part in ("sam_mask_decoder", "sam_prompt_encoder", "memory_encoder", "memory_attention", "mask_downsample"):
        delattr(model, part)
    del model.obj_ptr_tpos_proj, model.obj_ptr_proj, model.image_encoder.neck
    trunk: Any = model.image_encoder.trunk
    assert trunk.channel_list == [128, 64, 32, 16]
    assert (trunk.stage_ends, trunk.q_pool_blocks) == ([0, 2, 5, 6], [1, 3, 6])
    assert trunk.patch_embed.proj.out_channels == trunk.blocks[0].norm1.normalized_shape[0] == 16
    block = trunk.blocks[1]
    assert (block.attn.qkv.in_features, block.attn.qkv.out_features) == (16, 3 * 32)
    assert [layer.out_features for layer in (*block.mlp.layers, block.attn.proj)] == [128, 32, 32]
    trunk.blocks = nn.Sequential(*map(Adapter, trunk.blocks))
    shapes: list[list[int]] = []
    trunk.blocks[1].block.register_forward_hook(lambda m, inputs, output: shapes.append([*inputs[0].shape]))
    pixels = torch.rand(2, 3, 352, 352, generator=torch.Generator().manual_seed(0))
    maps = trunk(pixels)
    assert [list(x.shape) for x in maps] == [
        [2, 16, 88, 88],
        [2, 32, 44, 44],
        [2, 64, 22, 22],
        [2, 128, 11, 11],
    ]
    assert shapes == [[2, 88, 88, 16]]
    sum(x.square().mean() for x in maps).backward()
    assert all(weight.grad is not None for name, weight in trunk.named_parameters() if ".learned." in name)
    with torch.no_grad():
        for adapter in trunk.blocks:
            adapter.learned[2].weight.zero_()
            adapter.learned[2].bias.zero_()
        for name, ours, plain in zip("abcd", trunk(pixels[:1]), before, strict=True):
            assert_close_l2(ours, plain, 1e-5, f"map {name}")  # adapters that add nothing


class Lora(nn.Module):
    """A product of two narrow layers beside a linear layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("part", ["sam_mask_decoder", "sam_prompt_encoder", "image_encoder", "memory_attention"])
def test_lora_in_every_linear_layer(model: sam.SAM2Base, part: str) -> None:
    """It acts in the predictor as in the modules; what does not see the image changes nothing."""
    predictor = SAM2ImagePredictor(model)
    predictor.set_image(IMAGE)
    before = predictor.predict(CLICKS, LABELS)[2]
    parents = [(parent, name) for parent in model.get_submodule(part).modules() for name, _ in parent.named_children()]
    linear = [(parent, name) for parent, name in parents if isinstance(getattr(parent, name), nn.Linear)]
    for parent, name in linear:
        lora = Lora(getattr(parent, name))
        randomise(lora.up)
        setattr(parent, name, lora)
    predictor.set_image(IMAGE)
    after = predictor.predict(CLICKS, LABELS)[2]
    model.kernels = "reference"
    official = SAM2ImagePredictor(model)
    official.set_image(IMAGE)
    assert_close_l2(torch.from_numpy(after), torch.from_numpy(official.predict(CLICKS, LABELS)[2]), 1e-5, "logits")
    changed = np.abs(after - before).max() > 1e-2
    assert changed == (part in ("sam_mask_decoder", "image_encoder"))


# Trainers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["image_encoder.trunk", "image_encoder", "sam_prompt_encoder", "sam_mask_decoder"])
def test_batches_of_images_with_a_prompt_each(model: sam.SAM2Base, part: str) -> None:
    """A trainer's step with ``repeat_image=False``: its gradients are those of the modules."""
    model.get_submodule(part).requires_grad_(True)
    coords = 60 * torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 0], [1, 1], [2, 3]])

    def step(kernels: str) -> dict[str, Tensor]:
        model.kernels = kernels
        s0, s1, features = model.forward_image(pixels_of(model, 3))["backbone_fpn"]
        sparse, dense = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        low_res, iou, tokens, scores = model.sam_mask_decoder(
            image_embeddings=features + model.no_mem_embed.view(1, -1, 1, 1),
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=False,
            high_res_features=[s0, s1],
        )
        loss = sum(x.square().mean() for x in (low_res, iou, tokens, scores))
        model.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        named = model.get_submodule(part).named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    ours, modules = step("auto"), step("reference")
    assert ours.keys() == modules.keys()
    assert len(ours) >= 4
    # Of what is added to every key, which changes no softmax, there is but rounding of the others.
    rounding = 1e-6 * max(gradient.norm() for gradient in modules.values())
    for name, gradient in modules.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + rounding, name


# Models in the place of others -----------------------------------------------------------------------------------


@pytest.fixture
def video() -> SAM2VideoPredictor:
    made: Any = build_sam.build_sam2_video_predictor(
        "sam2.1_hiera_t.yaml",
        device="cpu",
        hydra_overrides_extra=[
            "++model.image_size=64",
            "++model.image_encoder.trunk.embed_dim=16",
            "++model.image_encoder.trunk.stages=[1,2,3,1]",
            "++model.image_encoder.trunk.global_att_blocks=[4]",
            "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]",
        ],
    )
    randomise(made)
    return made.requires_grad_(False)


def test_a_predictor_of_videos_serves_images(video: SAM2VideoPredictor) -> None:
    """The image predictor, its restored features and the generator take it as a model."""
    video.fill_hole_area = 0
    plain = sam.build_from_config(video.config)
    plain.load_state_dict(video.state_dict())
    records, answers = [], []
    for model in (video, plain):
        predictor = SAM2ImagePredictor(model)
        assert predictor.model is model
        predictor.set_image(IMAGE)
        restored = SAM2ImagePredictor(model)
        restored._features, restored._orig_hw, restored._is_image_set = predictor._features, [(60, 90)], True
        answers += [restored.predict(CLICKS, LABELS), predictor.predict(CLICKS, LABELS)]
        records.append(SAM2AutomaticMaskGenerator(model, **ALL).generate(IMAGE))
    for answer in answers[1:]:
        assert all(np.array_equal(ours, other) for ours, other in zip(answer, answers[0], strict=True))
    assert [record["area"] for record in records[0]] == [record["area"] for record in records[1]]
    assert len(records[0]) > 9


@pytest.mark.parametrize(
    "what",
    ["model", *(pytest.param(part, marks=pytest.mark.slow) for part in ("sam_mask_decoder", "image_encoder.trunk"))],
)
def test_compiled_modules(model: sam.SAM2Base, what: str) -> None:
    predictor = SAM2ImagePredictor(copy.deepcopy(model))
    predictor.set_image(IMAGE)
    expected = predictor.predict(CLICKS, LABELS)
    if what == "model":
        compiled = SAM2ImagePredictor(torch.compile(model, backend="eager"))
    else:
        parent, _, name = what.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
        compiled = SAM2ImagePredictor(model)
    compiled.set_image(IMAGE)
    for name, ours, other in zip(("masks", "IoU", "logits"), compiled.predict(CLICKS, LABELS), expected, strict=True):
        limit = 0.03 if name == "masks" else 1e-5
        assert_close_l2(torch.from_numpy(ours), torch.from_numpy(other), limit, name)


@pytest.mark.parametrize("kind", [SAM2ImagePredictor, SAM2AutomaticMaskGenerator])
def test_from_the_hub_with_arguments_of_both(kind: Any, model: sam.SAM2Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument goes to the builder or to the class; one of neither is named."""
    given: dict[str, Any] = {}

    def build(model_id: str, **options: Any) -> sam.SAM2Base:
        given.update(options, model_id=model_id)
        return model

    monkeypatch.setattr(build_sam, "build_sam2_hf", build)
    options = {"device": "cpu", "mode": "eval", "hydra_overrides_extra": [], "apply_postprocessing": False}
    made = kind.from_pretrained("facebook/sam2.1-hiera-tiny", mask_threshold=0.5, **options)
    assert given == {**options, "model_id": "facebook/sam2.1-hiera-tiny"}
    assert made.mask_threshold == 0.5
    with pytest.raises(TypeError, match=rf"{kind.__name__} takes no 'image_size'"):
        kind.from_pretrained("facebook/sam2.1-hiera-tiny", image_size=512)


# Tensors and threads ---------------------------------------------------------------------------------------------


def test_answers_are_ordinary_tensors(model: sam.SAM2Base) -> None:
    """They may be edited and put into a loss, and what ``predict`` answers may be written to."""
    predictor = SAM2ImagePredictor(model)
    predictor.set_image(IMAGE)
    assert predictor._features is not None
    _, coords, labels, _ = predictor._prep_prompts(CLICKS, LABELS, None, None, True)
    answers = predictor._predict(coords, labels, return_logits=True)
    embedding = model.encode(IMAGE)
    ours = model.predict(embedding, [sam.Prompt(CLICKS, LABELS)])
    made = (*answers, predictor._features["image_embed"], *predictor._features["high_res_feats"], embedding.features)
    for tensor in (*made, *embedding.high_res, ours.low_res_logits, ours.iou_predictions, ours.masks):
        assert not tensor.is_inference()
        tensor[tensor < 0] = 0
        weight = torch.ones(1, requires_grad=True)
        (tensor * weight).sum().backward()
        assert weight.grad is not None
    for array in predictor.predict(CLICKS, LABELS):
        array[:] = 0


def test_one_predictor_in_threads(model: sam.SAM2Base) -> None:
    predictor = SAM2ImagePredictor(model)
    predictor.set_image(IMAGE)
    expected = [predictor.predict(CLICKS[:1] + step, LABELS[:1])[2] for step in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda step: predictor.predict(CLICKS[:1] + step, LABELS[:1])[2], range(4)))
    assert all(np.array_equal(ours, other) for ours, other in zip(found, expected, strict=True))
