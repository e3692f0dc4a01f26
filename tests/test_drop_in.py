"""Scripts written for ``segment_anything`` work with ``sam`` in its place."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_image

import sam
from sam import Sam, SamPredictor
from sam.build_sam import _build_sam
from sam.utils.transforms import resize, to_pil_image

# The public signatures of segment_anything 1.0.1, annotations left out.
OFFICIAL = {
    "predictor.SamPredictor": "sam_model",
    "predictor.SamPredictor.set_image": "self, image, image_format='RGB'",
    "predictor.SamPredictor.set_torch_image": "self, transformed_image, original_image_size",
    "predictor.SamPredictor.predict": "self, point_coords=None, point_labels=None, box=None, mask_input=None, "
    "multimask_output=True, return_logits=False",
    "predictor.SamPredictor.predict_torch": "self, point_coords, point_labels, boxes=None, mask_input=None, "
    "multimask_output=True, return_logits=False",
    "predictor.SamPredictor.get_image_embedding": "self",
    "predictor.SamPredictor.reset_image": "self",
    "automatic_mask_generator.SamAutomaticMaskGenerator": "model, points_per_side=32, points_per_batch=64, "
    "pred_iou_thresh=0.88, stability_score_thresh=0.95, stability_score_offset=1.0, box_nms_thresh=0.7, "
    "crop_n_layers=0, crop_nms_thresh=0.7, crop_overlap_ratio=512 / 1500, crop_n_points_downscale_factor=1, "
    "point_grids=None, min_mask_region_area=0, output_mode='binary_mask'",
    "automatic_mask_generator.SamAutomaticMaskGenerator.generate": "self, image",
    "automatic_mask_generator.SamAutomaticMaskGenerator.postprocess_small_regions": "mask_data, min_area, nms_thresh",
    "build_sam.build_sam_vit_h": "checkpoint=None",
    "build_sam.build_sam_vit_l": "checkpoint=None",
    "build_sam.build_sam_vit_b": "checkpoint=None",
    "build_sam.build_sam": "checkpoint=None",
    "modeling.Sam": "image_encoder, prompt_encoder, mask_decoder, "
    "pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.395, 57.12, 57.375)",
    "modeling.Sam.forward": "self, batched_input, multimask_output",
    "modeling.Sam.postprocess_masks": "self, masks, input_size, original_size",
    "modeling.Sam.preprocess": "self, x",
    "modeling.ImageEncoderViT": "img_size=1024, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, "
    "mlp_ratio=4.0, out_chans=256, qkv_bias=True, norm_layer=torch.nn.LayerNorm, act_layer=torch.nn.GELU, "
    "use_abs_pos=True, use_rel_pos=False, rel_pos_zero_init=True, window_size=0, global_attn_indexes=()",
    "modeling.ImageEncoderViT.forward": "self, x",
    "modeling.image_encoder.Block": "dim, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=torch.nn.LayerNorm, "
    "act_layer=torch.nn.GELU, use_rel_pos=False, rel_pos_zero_init=True, window_size=0, input_size=None",
    "modeling.image_encoder.Attention": "dim, num_heads=8, qkv_bias=True, use_rel_pos=False, "
    "rel_pos_zero_init=True, input_size=None",
    "modeling.image_encoder.window_partition": "x, window_size",
    "modeling.image_encoder.window_unpartition": "windows, window_size, pad_hw, hw",
    "modeling.image_encoder.get_rel_pos": "q_size, k_size, rel_pos",
    "modeling.image_encoder.add_decomposed_rel_pos": "attn, q, rel_pos_h, rel_pos_w, q_size, k_size",
    "modeling.image_encoder.PatchEmbed": "kernel_size=(16, 16), stride=(16, 16), padding=(0, 0), in_chans=3, "
    "embed_dim=768",
    "modeling.common.MLPBlock": "embedding_dim, mlp_dim, act=torch.nn.GELU",
    "modeling.common.LayerNorm2d": "num_channels, eps=1e-06",
    "modeling.PromptEncoder": "embed_dim, image_embedding_size, input_image_size, mask_in_chans, "
    "activation=torch.nn.GELU",
    "modeling.PromptEncoder.forward": "self, points, boxes, masks",
    "modeling.PromptEncoder.get_dense_pe": "self",
    "modeling.prompt_encoder.PositionEmbeddingRandom": "num_pos_feats=64, scale=None",
    "modeling.prompt_encoder.PositionEmbeddingRandom.forward": "self, size",
    "modeling.prompt_encoder.PositionEmbeddingRandom.forward_with_coords": "self, coords_input, image_size",
    "modeling.MaskDecoder": "*, transformer_dim, transformer, num_multimask_outputs=3, activation=torch.nn.GELU, "
    "iou_head_depth=3, iou_head_hidden_dim=256",
    "modeling.MaskDecoder.forward": "self, image_embeddings, image_pe, sparse_prompt_embeddings, "
    "dense_prompt_embeddings, multimask_output",
    "modeling.MaskDecoder.predict_masks": "self, image_embeddings, image_pe, sparse_prompt_embeddings, "
    "dense_prompt_embeddings",
    "modeling.mask_decoder.MLP": "input_dim, hidden_dim, output_dim, num_layers, sigmoid_output=False",
    "modeling.TwoWayTransformer": "depth, embedding_dim, num_heads, mlp_dim, activation=torch.nn.ReLU, "
    "attention_downsample_rate=2",
    "modeling.TwoWayTransformer.forward": "self, image_embedding, image_pe, point_embedding",
    "modeling.transformer.TwoWayAttentionBlock": "embedding_dim, num_heads, mlp_dim=2048, activation=torch.nn.ReLU, "
    "attention_downsample_rate=2, skip_first_layer_pe=False",
    "modeling.transformer.TwoWayAttentionBlock.forward": "self, queries, keys, query_pe, key_pe",
    "modeling.transformer.Attention": "embedding_dim, num_heads, downsample_rate=1",
    "modeling.transformer.Attention.forward": "self, q, k, v",
    "utils.transforms.ResizeLongestSide": "target_length",
    "utils.transforms.ResizeLongestSide.apply_image": "self, image",
    "utils.transforms.ResizeLongestSide.apply_coords": "self, coords, original_size",
    "utils.transforms.ResizeLongestSide.apply_boxes": "self, boxes, original_size",
    "utils.transforms.ResizeLongestSide.apply_image_torch": "self, image",
    "utils.transforms.ResizeLongestSide.apply_coords_torch": "self, coords, original_size",
    "utils.transforms.ResizeLongestSide.apply_boxes_torch": "self, boxes, original_size",
    "utils.transforms.ResizeLongestSide.get_preprocess_shape": "oldh, oldw, long_side_length",
    "utils.amg.MaskData": "**kwargs",
    "utils.amg.MaskData.items": "self",
    "utils.amg.MaskData.filter": "self, keep",
    "utils.amg.MaskData.cat": "self, new_stats",
    "utils.amg.MaskData.to_numpy": "self",
    "utils.amg.is_box_near_crop_edge": "boxes, crop_box, orig_box, atol=20.0",
    "utils.amg.box_xyxy_to_xywh": "box_xyxy",
    "utils.amg.batch_iterator": "batch_size, *args",
    "utils.amg.mask_to_rle_pytorch": "tensor",
    "utils.amg.rle_to_mask": "rle",
    "utils.amg.area_from_rle": "rle",
    "utils.amg.calculate_stability_score": "masks, mask_threshold, threshold_offset",
    "utils.amg.build_point_grid": "n_per_side",
    "utils.amg.build_all_layer_point_grids": "n_per_side, n_layers, scale_per_layer",
    "utils.amg.generate_crop_boxes": "im_size, n_layers, overlap_ratio",
    "utils.amg.uncrop_boxes_xyxy": "boxes, crop_box",
    "utils.amg.uncrop_points": "points, crop_box",
    "utils.amg.uncrop_masks": "masks, crop_box, orig_h, orig_w",
    "utils.amg.remove_small_regions": "mask, area_thresh, mode",
    "utils.amg.coco_encode_rle": "uncompressed_rle",
    "utils.amg.batched_mask_to_box": "masks",
    "utils.onnx.SamOnnxModel": "model, return_single_mask, use_stability_score=False, return_extra_metrics=False",
    "utils.onnx.SamOnnxModel.resize_longest_image_size": "input_image_size, longest_side",
    "utils.onnx.SamOnnxModel.mask_postprocessing": "self, masks, orig_im_size",
    "utils.onnx.SamOnnxModel.select_masks": "self, masks, iou_preds, num_points",
    "utils.onnx.SamOnnxModel.forward": "self, image_embeddings, point_coords, point_labels, mask_input, "
    "has_mask_input, orig_im_size",
}


def resolve(path: str) -> object:
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            result: object = importlib.import_module(".".join(["sam", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            result = getattr(result, name)
        return result
    raise ModuleNotFoundError(path)


def signature_of(text: str) -> inspect.Signature:
    scope = {"torch": torch}
    exec(f"def function({text}): ...", scope)
    return inspect.signature(scope["function"])  # type: ignore[arg-type]


# None in ours is what suits the model, the official value where it is SAM: test_thresholds_that_nobody_says.
OF_THE_MODEL = {
    "automatic_mask_generator.SamAutomaticMaskGenerator": ("pred_iou_thresh", "stability_score_thresh"),
}


@pytest.mark.parametrize("path", OFFICIAL)
def test_signature(path: str) -> None:
    """Official parameters first and in order, same kinds and defaults; what we add has a default."""
    expected = list(signature_of(OFFICIAL[path]).parameters.values())
    actual = list(inspect.signature(resolve(path)).parameters.values())  # type: ignore[arg-type]
    for theirs, ours in zip(expected, actual, strict=False):
        assert (ours.name, ours.kind) == (theirs.name, theirs.kind)
        assert ours.default == (None if ours.name in OF_THE_MODEL.get(path, ()) else theirs.default)
    assert len(actual) >= len(expected)
    assert all(extra.default is not inspect.Parameter.empty for extra in actual[len(expected) :])


def test_top_level_names_and_registry() -> None:
    for name in (
        "SamAutomaticMaskGenerator",
        "SamPredictor",
        "build_sam",
        "build_sam_vit_b",
        "build_sam_vit_h",
        "build_sam_vit_l",
    ):
        assert hasattr(sam, name)
    assert set(sam.sam_model_registry) >= {"default", "vit_h", "vit_l", "vit_b"}
    assert sam.build_sam is sam.build_sam_vit_h is sam.sam_model_registry["default"]


# What ``import *`` gives besides the module's own names, where public programs import by star.
STAR_NAMES = {
    "": "SamPredictor SamAutomaticMaskGenerator build_sam build_sam_vit_h build_sam_vit_l build_sam_vit_b "
    "sam_model_registry automatic_mask_generator modeling predictor utils",
    ".build_sam": "torch partial ImageEncoderViT MaskDecoder PromptEncoder Sam TwoWayTransformer",
    ".modeling": "Sam ImageEncoderViT MaskDecoder PromptEncoder TwoWayTransformer",
    ".modeling.sam": "torch nn F Any Dict List Tuple Sam ImageEncoderViT MaskDecoder PromptEncoder",
    ".utils.transforms": "np torch F resize to_pil_image deepcopy Tuple ResizeLongestSide",
}


@pytest.mark.parametrize("module", STAR_NAMES)
def test_star_names(module: str) -> None:
    scope: dict[str, object] = {}
    exec(f"from sam{module} import *", scope)
    assert [name for name in STAR_NAMES[module].split() if name not in scope] == []


def test_functions_of_torchvision() -> None:
    """Those that come by star from ``utils.transforms``, with the sizes that they have there."""
    picture = to_pil_image(random_image(8, 12))
    assert (picture.mode, picture.size) == ("RGB", (12, 8))
    assert resize(picture, (4, 6)).size == (6, 4)


def test_the_official_builder(tmp_path: Path) -> None:
    """Fine-tunes call ``_build_sam`` with sizes of their own."""
    sizes: dict[str, Any] = {"encoder_embed_dim": 64, "encoder_depth": 2, "encoder_num_heads": 2}
    model = _build_sam(**sizes, encoder_global_attn_indexes=[1])
    assert not model.training
    assert model.image_encoder.img_size == 1024
    assert [block.window_size for block in model.image_encoder.blocks] == [14, 0]
    assert model.image_encoder.blocks[0].attn.num_heads == 2
    path = tmp_path / "fine_tune.pth"
    torch.save(model.state_dict(), path)
    loaded = _build_sam(**sizes, encoder_global_attn_indexes=(1,), checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    with pytest.raises(sam.CheckpointError, match=r"fine_tune.pth: .*image_encoder\.blocks\.0\.attn\.rel_pos_h"):
        _build_sam(**sizes, encoder_global_attn_indexes=(0, 1), checkpoint=path)
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*none\.pth"):
        _build_sam(**sizes, encoder_global_attn_indexes=(1,), checkpoint=tmp_path / "none.pth")
    with pytest.raises(ValueError, match="encoder_num_heads=5 must divide encoder_embed_dim=64"):
        _build_sam(64, 2, 5, (1,))


def test_subclasses_that_do_not_call_init(tiny: Sam) -> None:
    """They set what the official ``__init__`` sets, and nothing of ours."""

    class Predictor(SamPredictor):
        def __init__(self, model: Sam) -> None:
            self.model, self.transform = model, sam.predictor.ResizeLongestSide(model.image_encoder.img_size)

    class Generator(sam.SamAutomaticMaskGenerator):
        def __init__(self, model: Sam) -> None:
            self.predictor = Predictor(model)
            self.point_grids = sam.utils.amg.build_all_layer_point_grids(2, 0, 1)
            self.points_per_batch, self.pred_iou_thresh, self.stability_score_thresh = 64, -1.0, 0.0
            self.stability_score_offset, self.box_nms_thresh, self.crop_n_layers = 1.0, 1.0, 0
            self.crop_nms_thresh, self.crop_overlap_ratio, self.crop_n_points_downscale_factor = 0.7, 0.3, 1
            self.min_mask_region_area, self.output_mode = 0, "uncompressed_rle"

    image = random_image(60, 80)
    ours, expected = Predictor(tiny), SamPredictor(tiny)
    with pytest.raises(RuntimeError, match="no image is set"):
        ours.predict()
    for predictor in (ours, expected):
        predictor.set_image(image)
    np.testing.assert_array_equal(ours.predict()[2], expected.predict()[2])
    like = {"pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    official = sam.SamAutomaticMaskGenerator(tiny, points_per_side=2, output_mode="uncompressed_rle", **like)
    records = Generator(tiny).generate(image)
    assert len(records) > 0
    assert records == official.generate(image)


def test_a_script_of_the_official_readme(photo: np.ndarray) -> None:
    """The steps of the official notebook, from the registry to a mask fed back."""
    model = sam.sam_model_registry["nano"]()
    model.to(device="cpu")
    predictor = SamPredictor(model)
    predictor.set_image(photo)
    assert predictor.get_image_embedding().shape == (1, 256, 32, 32)
    assert predictor.is_image_set
    assert tuple(predictor.original_size) == photo.shape[:2]
    assert tuple(predictor.input_size) == (341, 512)
    point, label = np.array([[170, 115]]), np.array([1])
    masks, scores, logits = predictor.predict(point_coords=point, point_labels=label, multimask_output=True)
    assert masks.shape == (3, 300, 451)
    assert masks.dtype == bool
    assert scores.shape == (3,)
    assert logits.shape == (3, 128, 128)
    assert scores.dtype == logits.dtype == np.float32
    masks, scores, _ = predictor.predict(
        point_coords=np.array([[170, 115], [30, 280]]),
        point_labels=np.array([1, 0]),
        mask_input=logits[np.argmax(scores), :, :][None],
        multimask_output=False,
    )
    assert masks.shape == (1, 300, 451)
    boxes = torch.tensor([[135, 85, 208, 148], [290, 108, 343, 165]])
    transformed = predictor.transform.apply_boxes_torch(boxes, photo.shape[:2])
    masks, _, _ = predictor.predict_torch(None, None, boxes=transformed, multimask_output=False)
    assert masks.shape == (2, 1, 300, 451)
    assert masks.dtype == torch.bool
    as_logits, _, _ = predictor.predict(point, label, return_logits=True)
    assert as_logits.dtype == np.float32
    predictor.reset_image()
    assert not predictor.is_image_set
    assert predictor.features is None


def test_batched_forward_equals_the_predictor(nano: Sam, photo: np.ndarray) -> None:
    """``Sam.forward`` on two images of different sizes, the second one without points."""
    images = [photo, random_image(200, 90)]
    predictor, records, expected = SamPredictor(nano), [], []
    for index, image in enumerate(images):
        predictor.set_image(image)
        resized = predictor.transform.apply_image(image)
        record = {"image": torch.as_tensor(resized).permute(2, 0, 1), "original_size": image.shape[:2]}
        boxes = torch.tensor([[5.0, 6.0, 70.0, 80.0], [20.0, 20.0, 60.0, 150.0]])
        record["boxes"] = predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
        coords = labels = None
        if index == 0:
            coords, labels = torch.tensor([[[30.0, 40.0]], [[200.0, 100.0]]]), torch.ones(2, 1)
            record["point_coords"], record["point_labels"] = coords, labels
        records.append(record)
        expected.append(predictor.predict_torch(coords, labels, record["boxes"], multimask_output=True))
    for output, (masks, iou, logits) in zip(nano(records, multimask_output=True), expected, strict=True):
        # The encoder saw two images at once here, which changes the last bits.
        torch.testing.assert_close(output["low_res_logits"], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output["iou_predictions"], iou, rtol=1e-4, atol=1e-5)
        assert output["masks"].shape == masks.shape
        assert (output["masks"] != masks).float().mean() < 1e-4


def test_an_embedding_restored_by_hand(nano: Sam, photo: np.ndarray) -> None:
    """Users save ``features`` and set the attributes themselves."""
    predictor, restored = SamPredictor(nano), SamPredictor(nano)
    predictor.set_image(photo)
    expected = predictor.predict(np.array([[170, 115]]), np.array([1]))
    saved = predictor.features.numpy().copy()
    restored.features = torch.as_tensor(saved)
    restored.original_size, restored.input_size = predictor.original_size, predictor.input_size
    restored.is_image_set = True
    for ours, theirs in zip(restored.predict(np.array([[170, 115]]), np.array([1])), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # A second image set by hand, over the first: nothing of the first may linger.
    restored.features = restored.features.flip(-1)
    assert not np.array_equal(restored.predict(np.array([[170, 115]]), np.array([1]))[2], expected[2])
    before = restored.predict(np.array([[170, 115]]), np.array([1]))[2]
    restored.features.mul_(0.5)
    assert not np.array_equal(restored.predict(np.array([[170, 115]]), np.array([1]))[2], before)


def test_bgr_is_rgb_reversed(nano: Sam, photo: np.ndarray) -> None:
    rgb, bgr = SamPredictor(nano), SamPredictor(nano)
    rgb.set_image(photo)
    bgr.set_image(photo[..., ::-1], image_format="BGR")
    assert torch.equal(rgb.features, bgr.features)


def test_prompts_the_official_predictor_takes(nano: Sam, photo: np.ndarray) -> None:
    predictor = SamPredictor(nano)
    predictor.set_image(photo)
    assert predictor.predict()[0].shape == (3, 300, 451)  # no prompt at all
    assert predictor.predict(np.zeros((0, 2)), np.zeros(0))[0].shape == (3, 300, 451)
    assert predictor.predict(box=np.array([[5, 6, 70, 80]]))[0].shape == (3, 300, 451)  # [1, 4]
    low_res = predictor.predict(np.array([[9, 9]]), np.array([1]))[2]
    assert predictor.predict(mask_input=low_res[:1])[0].shape == (3, 300, 451)
    outside, _, _ = predictor.predict(np.array([[-50, 9000]]), np.array([1]))
    assert outside.shape == (3, 300, 451)
    ignored, _, _ = predictor.predict(point_labels=np.array([1]))  # labels alone say nothing
    np.testing.assert_array_equal(ignored, predictor.predict()[0])
    # One mask serves many points, and one set of points many masks.
    coords, labels = torch.rand(3, 2, 2) * 300, torch.ones(3, 2)
    one, many = torch.as_tensor(low_res[:1, None]), torch.as_tensor(low_res[:, None])
    assert predictor.predict_torch(coords, labels, mask_input=one)[2].shape == (3, 3, 128, 128)
    several = predictor.predict_torch(coords[:1], labels[:1], mask_input=many)[2]
    alone = predictor.predict_torch(coords[:1], labels[:1], mask_input=many[2:])[2]
    torch.testing.assert_close(several[2:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1500, 2250), (2250, 1500), (37, 20), (683, 1024), (1, 1), (1, 1000)])
def test_resize_longest_side(size: tuple[int, int]) -> None:
    transform = sam.predictor.ResizeLongestSide(1024)
    height, width = transform.get_preprocess_shape(*size, 1024)
    scale = 1024 / max(size)
    assert (height, width) == (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    image = random_image(*size)
    assert transform.apply_image(image).shape == (height, width, 3)
    assert transform.apply_image(image[..., 0]).shape == (height, width)
    corner = np.array([[size[1], size[0]]])
    np.testing.assert_allclose(transform.apply_coords(corner, size), [[width, height]])
    np.testing.assert_allclose(transform.apply_coords_torch(torch.tensor(corner), size), [[width, height]])
    boxes = transform.apply_boxes(np.array([[0, 0, size[1], size[0]]]), size)
    np.testing.assert_allclose(boxes, [[0, 0, width, height]])
    close = transform.apply_image_torch(torch.as_tensor(image).permute(2, 0, 1)[None].float())
    assert close.shape == (1, 3, height, width)
