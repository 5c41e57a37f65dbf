"""Settings shared by all tests."""

import pytest
import torch

from sbi_jeffreys import losses, trainer


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Fixtures of a module, too, train on one thread: two may round differently."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _deterministic(_one_thread):
    """Every test starts from the same seed, on one thread, and leaves both be."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _few_conditions():
    """Small networks learn in seconds; to imagine thousands of outputs takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "NUM_CONDITIONS", 200)
        yield


@pytest.fixture
def without_averaging(monkeypatch):
    """Let epochs be judged by the weights that they end with, which are known."""
    monkeypatch.setattr(trainer, "NUM_AVERAGED_EPOCHS", 0)
    monkeypatch.setattr(trainer, "NUM_POOLED_AVERAGED_STEPS", 0)
