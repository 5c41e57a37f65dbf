"""Settings shared by all tests."""

import pytest
import torch

from sbi_jeffreys import trainer


@pytest.fixture(autouse=True)
def _deterministic():
    """Every test starts from the same seed, on one thread, and leaves both be."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def without_averaging(monkeypatch):
    """Let epochs be judged by the weights that they end with, which are known."""
    monkeypatch.setattr(trainer, "NUM_AVERAGED_EPOCHS", 0)
