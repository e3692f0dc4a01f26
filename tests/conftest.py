"""Fixtures that the tests share."""

from __future__ import annotations

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from interpreter import prepare_the_interpreter

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter then, which has to be chosen before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton") is not None:
        prepare_the_interpreter()

if "PYTEST_XDIST_WORKER" in os.environ:
    # A thread for each process of tests, also in the processes that tests start: two that share cores wait in turn.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

from hypothesis import settings
from models import TINY, random_model

import sam
from sam import Sam
from sam.system import hardware

torch.backends.cudnn.allow_tf32 = False  # or fp32 convolutions on a GPU, and the budgets that they give, have 10 bits

settings.register_profile("oracles", max_examples=1000)  # make test-oracles


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast-bf16",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether this CPU multiplies bf16 faster than fp32, for every test (default: as it is)",
    )


# Of few, long tests, in processes of their own. xdist begins with files of many: a worker would wait for these.
FIRST = (
    "test_training_runs",
    "test_track",
    "test_service_process",
    "test_compile_report",
    "test_as_segment_anything",
    "test_run",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed what is drawn without a generator: torch begins every process elsewhere, and a test would pass by chance."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False
    answer = config.getoption("--fast-bf16")
    if answer != "auto":
        hardware._cpu_has_bf16_products = lambda: answer == "yes"


@pytest.fixture(scope="session")
def nano() -> Sam:
    return sam.load_model(device="cpu").requires_grad_(False)


@pytest.fixture(scope="session")
def nano_state(nano: Sam) -> dict[str, torch.Tensor]:
    return nano.state_dict()


@pytest.fixture
def tiny() -> Sam:
    return random_model(TINY)


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A photograph of 300x451."""
    from skimage import data

    return data.chelsea()
