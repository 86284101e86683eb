"""Shared by all tests: few threads of torch, and no network."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    alone = "PYTEST_XDIST_WORKER" not in os.environ  # else other tests run beside
    torch.set_num_threads(min(2, os.cpu_count() or 1) if alone else 1)
