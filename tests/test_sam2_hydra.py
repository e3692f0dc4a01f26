"""Programs that compose configs by hydra themselves: the files beside the package, and what their own folders hold."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_sam2_build import SMALL

import sam
import sam.sam2
from sam.sam2.build_sam import build_sam2

hydra = pytest.importorskip("hydra")
instantiate = pytest.importorskip("hydra.utils").instantiate
GlobalHydra = pytest.importorskip("hydra.core.global_hydra").GlobalHydra
NAME = "configs/sam2.1/sam2.1_hiera_t.yaml"


@pytest.fixture(autouse=True)
def as_imported() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()
    sam.sam2._offer_configs()


def test_importing_offers_the_configs() -> None:
    assert GlobalHydra.instance().is_initialized()
    composed = hydra.compose(config_name=NAME, overrides=SMALL)
    assert composed.model.image_size == 64
    assert type(instantiate(composed.model, _recursive_=True)) is sam.SAM2Base


def test_a_hydra_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    GlobalHydra.instance().clear()
    hydra.initialize_config_dir(config_dir=str(tmp_path), version_base=None)
    sources = [str(source.path) for source in GlobalHydra.instance().config_loader().get_sources()]
    sam.sam2._offer_configs()
    assert [str(source.path) for source in GlobalHydra.instance().config_loader().get_sources()] == sources
    assert build_sam2(NAME, device="cpu", hydra_overrides_extra=SMALL).image_size == 64  # by the table


@pytest.mark.parametrize("module", ["sam.sam2", "sam2", "sam2.configs"])
def test_the_package_is_a_config_module(module: str) -> None:
    GlobalHydra.instance().clear()
    with sam.as_sam2():
        hydra.initialize_config_module(module, version_base="1.2")
        name = NAME.removeprefix("configs/") if module.endswith("configs") else NAME
        assert hydra.compose(config_name=name).model.num_maskmem == 7
    assert importlib.resources.files("sam.sam2").joinpath("sam2_hiera_l.yaml").is_file()


def test_a_config_of_the_caller(tmp_path: Path) -> None:
    """The table has no such name, and its targets are the official paths."""
    text = (Path(str(sam.sam2.__file__)).parent / NAME).read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("sam.sam2.", "sam2.").replace("num_maskmem: 7", "num_maskmem: 3"))
    GlobalHydra.instance().clear()
    hydra.initialize_config_dir(config_dir=str(tmp_path), version_base=None)
    model = build_sam2("mine.yaml", device="cpu", hydra_overrides_extra=SMALL)
    assert (model.num_maskmem, model.image_size) == (3, 64)
    assert model.config is not None
    assert model.config.num_maskmem == 3
    with sam.as_sam2():
        assert type(instantiate(hydra.compose(config_name="mine", overrides=SMALL).model)) is sam.SAM2Base
    with pytest.raises(ValueError, match=r"unknown config 'yours.yaml'.*; nor has hydra found it"):
        build_sam2("yours.yaml", device="cpu")
