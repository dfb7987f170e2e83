"""What every test gets: one thread per worker, no network, fixed seeds."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once

import random
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from pumer.reducers import DynamicViT, SmartTrim

settings.register_profile("pumer", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("pumer")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already share the cores out among them


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish():
    """Leave the objects of all imported libraries out of every later collection of garbage: it is
    many times as fast without these millions, and what a test leaves behind is found as before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_parts(monkeypatch):
    """New parts of learned reducers are the same every time, and decide about as often for as
    against a token."""
    for kind in (DynamicViT, SmartTrim):
        monkeypatch.setattr(kind, "parts", partialmethod(_same_parts, kind.parts))


def _same_parts(self, parts, *shape):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = parts(self, *shape)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.fixture(scope="session")
def shared():
    """Reference data in a folder beside the checkout: too large for the repository, so it may be
    absent."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder.name}/ is not beside the checkout")
    return folder
