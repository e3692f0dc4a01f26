"""SAM 2 at its own size, all four sizes, against Meta's package and transformers; and the memory that it takes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.official_sam2 import random_sam2
from fastsam_kernels.numerics import relative_error
from sam.config import SAM2_VARIANTS, HieraConfig

_RENAMED = (
    (r"^trunk\.", "backbone."),
    (r"^neck\.convs\.(\d)\.conv\.", r"neck.convs.\1."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"mlp\.layers\.0\.", "mlp.proj_in."),
    (r"mlp\.layers\.1\.", "mlp.proj_out."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
)


def in_transformers(config: HieraConfig, state: dict[str, Tensor]) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    stages = range(len(config.stages))
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=config.embed_dim,
        num_attention_heads=config.num_heads,
        window_positional_embedding_background_size=list(config.window_pos_embed_bkg_spatial_size),
        blocks_per_stage=list(config.stages),
        embed_dim_per_stage=config.channel_list[::-1],
        num_attention_heads_per_stage=[config.num_heads * 2**stage for stage in stages],
        window_size_per_stage=list(config.window_spec),
        global_attention_blocks=list(config.global_att_blocks),
    )
    vision = transformers.Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=config.channel_list)
    model = transformers.Sam2VisionModel(vision).eval()
    for pattern, name in _RENAMED:
        state = {re.sub(pattern, name, key): weight for key, weight in state.items()}
    model.load_state_dict(state)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("variant", [variant for variant in SAM2_VARIANTS if "2.1" in variant])
def test_equals_transformers(variant: str) -> None:
    model = random_sam2(variant, image_size=1024)
    assert model.config is not None
    pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        port = in_transformers(model.config.image_encoder, model.image_encoder.state_dict())
        maps = port(pixels).fpn_hidden_states
        decoder = model.sam_mask_decoder
        expected = [decoder.conv_s0(maps[0]), decoder.conv_s1(maps[1]), maps[2] + model.no_mem_embed.view(1, -1, 1, 1)]
        features = model.image_features(pixels)
    for ours, theirs in zip((*features.high_res, features.embedding), expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", SAM2_VARIANTS)
def test_equals_the_official_package(variant: str) -> None:
    """In a process of its own, as other tests take ``sam2`` for absent."""
    spec = importlib.util.find_spec("sam2")
    if spec is None or spec.origin is None or importlib.util.find_spec("iopath") is None:
        pytest.skip("Meta's sam2 and its iopath cannot be imported here: PYTHONPATH names no folder of theirs")
    folder = Path(spec.origin).parents[1]
    command = [sys.executable, "-m", "benchmarks.official_sam2_sizes", "--sam2", str(folder), "--variant", variant]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| {variant} |" in done.stdout


_PEAK = """
import torch
from benchmarks.official_sam2 import random_sam2

def kibibytes(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

model = random_sam2("sam2.1_tiny", image_size=1024)
model.kernels = "{kernels}"
pixels = torch.randn(1, 3, 1024, 1024)
with torch.inference_mode():
    model.image_features(pixels[:, :, :256, :256])  # what is made once
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = kibibytes("VmRSS")
    model.image_features(pixels)
print(kibibytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is that of Linux")
def test_an_image_takes_less_than_half_of_the_official_memory() -> None:
    def peak(kernels: str) -> int:
        command = [sys.executable, "-c", _PEAK.format(kernels=kernels)]
        root = Path(__file__).parent.parent
        return int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)

    assert peak("torch") < peak("reference") / 2
