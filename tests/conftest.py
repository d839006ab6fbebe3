r"""Fixtures and options shared by all tests: ``pytest --device cuda`` runs them on a GPU."""

from __future__ import annotations

import os

# Tests run in two processes, and some start more: threads on top of these slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="the device on which the tests run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


@pytest.fixture(scope="session")
def device_name(request: pytest.FixtureRequest) -> str:
    r"""The device as an option of the scripts."""
    return str(request.config.getoption("--device"))


@pytest.fixture
def no_global_state():
    r"""Holds a test to leave pyplot's figures and matplotlib's settings as they were."""
    settings = dict(matplotlib.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings


@pytest.fixture(autouse=True)
def _isolated():
    r"""Seeds the generators, validates every distribution, and empties Pyro's parameter store."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    yield
    pyro.clear_param_store()


@pytest.fixture
def tf32_modules():
    r"""The modules of torch that may compute in TF32, which here they are told to."""
    modules = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = True
    yield modules
    for module, value in zip(modules, before, strict=True):
        module.allow_tf32 = value
