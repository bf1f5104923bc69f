from __future__ import annotations

import pytest
import torch
from dense_client import DenseClient


@pytest.fixture(autouse=True)
def _inference():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture
def client() -> DenseClient:
    return DenseClient()
