"""``sam2.build_sam``: configs by all their names, overrides, what is refused, and hydra where it is installed."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import sam
import sam.sam2
from sam.config import SAM2_VARIANTS
from sam.sam2 import build_sam, model_tree
from sam.sam2.build_sam import HF_MODEL_ID_TO_FILENAMES, build_sam2
from sam.sam2.model_tree import CONFIG_VARIANTS, config_of, instantiate, read_tree, tree_of
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor

# A model of the same kind that is built in no time.
SMALL = [
    "++model.image_size=64",
    "++model.image_encoder.trunk.embed_dim=16",
    "++model.image_encoder.trunk.stages=[1,2,3,1]",
    "++model.image_encoder.trunk.global_att_blocks=[4]",
    "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]",
    "++model.memory_attention.num_layers=1",
]


def small(**options: Any) -> sam.SAM2Base:
    return build_sam2("sam2.1_hiera_t.yaml", device="cpu", **{"hydra_overrides_extra": SMALL, **options})


@pytest.mark.parametrize(
    "spelling",
    [
        "configs/{0}/{1}.yaml",
        "configs/{0}/{1}",
        "./configs/{0}/{1}.yaml",
        "/configs/{0}/{1}.yaml",
        "{1}.yaml",
        "{1}",
        "{0}/{1}.yaml",
        "../sam2_configs/{1}.yaml",
        "/nowhere/on/this/machine/{1}.yaml",
    ],
)
@pytest.mark.parametrize("name", ["sam2_hiera_b+", "sam2.1_hiera_l"])
def test_a_config_is_found_by_the_last_part_of_its_name(spelling: str, name: str) -> None:
    tree = read_tree(spelling.format(name.split("_")[0], name), [f"++model.{build_sam.POSTPROCESSING_SWITCH}=true"])
    assert config_of(tree) == SAM2_VARIANTS[CONFIG_VARIANTS[name]]


@pytest.mark.parametrize("name", CONFIG_VARIANTS)
def test_files_beside_the_package_are_the_table(name: str, tmp_path: Path) -> None:
    """Programs look for them beside the package, and compose them; a change of the table has to write them anew."""
    pytest.importorskip("yaml")
    model_tree.write_configs(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.yaml"))
    folder = Path(str(sam.sam2.__file__)).parent
    assert len(written) == 12
    for place in (place for place in written if place.stem == name):
        assert (folder / place).read_text() == (tmp_path / place).read_text()
        tree = tree_of(SAM2_VARIANTS[CONFIG_VARIANTS[name]])
        assert read_tree(str(folder / place)) == tree


def test_a_tree_builds_the_model_of_its_config() -> None:
    model = small()
    config = model.config
    assert config is not None
    assert (config.variant, config.image_size, config.memory_attention_layers) == ("custom", 64, 1)
    assert config.dynamic_multimask_via_stability
    other = sam.build_from_config(config)
    other.load_state_dict(model.state_dict())
    assert other.model_hash == model.model_hash
    assert not model.training


def test_released_names_stay_with_other_image_sizes() -> None:
    tree = read_tree("sam2_hiera_s", ["++model.image_size=512", f"++model.{build_sam.POSTPROCESSING_SWITCH}=true"])
    config = config_of(tree)
    assert config == SAM2_VARIANTS["sam2_small"].with_image_size(512)


@pytest.mark.parametrize("name", CONFIG_VARIANTS)
@pytest.mark.parametrize("options", [(), build_sam._POSTPROCESSING, build_sam._VIDEO_POSTPROCESSING])
def test_released_names_stay_with_and_without_post_processing(name: str, options: tuple[str, ...]) -> None:
    """Of a predictor of videos too, which fills holes and remembers masks with hard edges."""
    target = f"++model._target_={build_sam._PREDICTOR}"
    overrides = [*options, target] if options is build_sam._VIDEO_POSTPROCESSING else [*options]
    config = config_of(read_tree(name, overrides))
    assert config is not None
    assert config.variant == CONFIG_VARIANTS[name]
    assert config.binarize_mask_from_pts_for_mem_enc == (options is build_sam._VIDEO_POSTPROCESSING)
    other = config_of(read_tree(name, [*overrides, "++model.num_maskmem=3"]))
    assert other is not None
    assert other.variant == "custom"


def test_options_of_the_builder() -> None:
    model = small(apply_postprocessing=False, mode="train", hydra_overrides_extra=(*SMALL, "model.num_maskmem=3"))
    assert model.training
    assert not model.sam_mask_decoder.dynamic_multimask_via_stability
    assert model.num_maskmem == 3
    assert model.config is not None
    assert not model.config.dynamic_multimask_via_stability
    given = ["++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.2", *SMALL]
    kept = copy.copy(given)
    decoder = small(apply_postprocessing=False, hydra_overrides_extra=given).sam_mask_decoder
    assert decoder.dynamic_multimask_stability_delta == 0.2
    assert given == kept


@pytest.mark.parametrize(
    "override",
    [
        "++model.max_cond_frames_in_attn=4",
        "++model.memory_temporal_stride_for_eval=2",
        "++model.multimask_output_in_sam=false",
        "++model.binarize_mask_from_pts_for_mem_enc=True",
        "model.add_tpos_enc_to_obj_ptrs=true",
        "+model.sigmoid_scale_for_mem_enc=1.5",
    ],
)
def test_overrides_reach_the_model(override: str) -> None:
    model = small(hydra_overrides_extra=[*SMALL, override])
    name, _, text = override.partition("model.")[2].partition("=")
    expected = {"false": False, "true": True}.get(text.lower(), text)
    assert str(getattr(model, name)) == str(expected)
    assert getattr(model.config, name) == getattr(model, name)


class OfTheProgram(sam.SAM2Base):
    def __init__(self, greeting: str = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.greeting = greeting


def test_a_subclass_of_the_program_is_the_target() -> None:
    own = types.ModuleType("of_the_program")
    own.OfTheProgram = OfTheProgram  # type: ignore[attr-defined]
    sys.modules["of_the_program"] = own
    try:
        overrides = [*SMALL, "++model._target_=of_the_program.OfTheProgram", "++model.greeting=hello"]
        model = small(hydra_overrides_extra=overrides)
    finally:
        del sys.modules["of_the_program"]
    assert type(model) is OfTheProgram
    assert model.greeting == "hello"


def test_trees_of_the_official_package_are_built_of_this_one() -> None:
    node = {"_target_": "sam2.modeling.position_encoding.PositionEmbeddingSine", "num_pos_feats": 8, "scale": None}
    assert type(instantiate(node)) is sam.sam2.modeling.position_encoding.PositionEmbeddingSine


def test_a_file_of_the_program_is_read(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    text = (Path(str(sam.sam2.__file__)).parent / "sam2_hiera_t.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("sam.sam2.", "sam2.").replace("num_maskmem: 7", "num_maskmem: 2"))
    config = config_of(read_tree(path))
    assert config is not None
    assert (config.num_maskmem, config.image_encoder) == (2, SAM2_VARIANTS["sam2_tiny"].image_encoder)
    path.write_text("trainer: {}\n")
    with pytest.raises(ValueError, match=r"mine.yaml is no config of a SAM 2 model: it has no model:"):
        read_tree(path)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a keyword": ({"image_size": 512}, TypeError, r"build_sam2 takes no 'image_size': .*\+\+model.image_size=512"),
    "an option that is none": (
        {"o": "++model.typo=3"},
        ValueError,
        r"^model.typo is no option of this model: .*SAM2Base",
    ),
    "one of the trunk": ({"o": "++model.image_encoder.trunk.typo=3"}, ValueError, r"trunk.typo is no option"),
    "one of the decoder": (
        {"o": "++model.sam_mask_decoder_extra_args.typo=1"},
        ValueError,
        r"sam_mask_decoder_extra_args.typo is no option of this model: the mask decoder",
    ),
    "one of videos": (
        {"o": "++model.fill_hole_area=8"},
        ValueError,
        r"^model.fill_hole_area is no option of this model",
    ),
    "a part that is not there": ({"o": "++model.nothing.x=1"}, ValueError, r"it has no nothing"),
    "no override": ({"o": "image_size=512"}, ValueError, r"an override is like \+\+model.image_size=512, got 'image_s"),
    "an image size": ({"o": "++model.image_size=500"}, ValueError, r"image_size must be a positive multiple of 32"),
    "a device": ({"device": "cuda:99"}, ValueError, r"cuda:99"),
    "a target": (
        {"o": "++model._target_=of.nowhere.Model"},
        ValueError,
        r"_target_ of.nowhere.Model cannot be imported",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_named(what: str) -> None:
    options, error, says = REFUSED[what]
    options = {"device": "cpu", **options}
    overrides = [options.pop("o")] if "o" in options else []
    with pytest.raises(error, match=says):
        build_sam2("sam2_hiera_t.yaml", hydra_overrides_extra=overrides, **options)


@pytest.mark.parametrize(
    "name", ["sam2_hiera_x.yaml", "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml", ""]
)
def test_unknown_configs_are_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown config '.*'; known by name are configs/sam2/sam2_hiera_t.yaml"):
        build_sam2(name, device="cpu")


def test_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert HF_MODEL_ID_TO_FILENAMES["facebook/sam2.1-hiera-base-plus"] == (
        "configs/sam2.1/sam2.1_hiera_b+.yaml",
        "sam2.1_hiera_base_plus.pt",
    )
    assert len(HF_MODEL_ID_TO_FILENAMES) == 8
    asked = []

    def download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        return str(tmp_path / "small.pt")

    torch.save({"model": small().state_dict()}, tmp_path / "small.pt")
    hub = types.SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    model = build_sam.build_sam2_hf("facebook/sam2.1-hiera-tiny", device="cpu", hydra_overrides_extra=SMALL)
    assert model.image_size == 64
    assert asked == [("facebook/sam2.1-hiera-tiny", "sam2.1_hiera_tiny.pt")]
    with pytest.raises(ValueError, match=r"unknown model 'facebook/sam9'; known: facebook/sam2-hiera-tiny"):
        build_sam.build_sam2_hf("facebook/sam9")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"facebook/sam2-hiera-tiny comes from the Hugging Face hub: pip install"):
        build_sam.build_sam2_hf("facebook/sam2-hiera-tiny")


def test_functions_of_forks_are_named_with_their_fork() -> None:
    with pytest.raises(ImportError, match=r"of its fork segment-anything-2-real-time"):
        from sam.sam2.build_sam import build_sam2_camera_predictor  # noqa: F401
    with pytest.raises(AttributeError, match=r"has no attribute 'build_sam3'"):
        build_sam.build_sam3  # noqa: B018


def test_the_builder_makes_a_predictor_of_videos() -> None:
    overrides = ["++model.image_size=64", "++model.non_overlap_masks=true"]
    predictor = build_sam.build_sam2_video_predictor("sam2.1_hiera_t", device="cpu", hydra_overrides_extra=overrides)
    assert type(predictor) is SAM2VideoPredictor
    assert (predictor.fill_hole_area, predictor.non_overlap_masks, predictor.image_size) == (8, True, 64)
    assert predictor.binarize_mask_from_pts_for_mem_enc
    assert predictor.config is not None
    assert predictor.config.version == "2.1"
    with pytest.raises(TypeError, match="image_size"):
        build_sam.build_sam2_video_predictor("sam2.1_hiera_t", device="cpu", image_size=64)
