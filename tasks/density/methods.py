"""Fits any method to samples and records how it does as training goes on."""

import json
import math
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbi_jeffreys import JeffreysDensityEstimator, JeffreysEstimator
from tasks.density.baselines import (
    NUM_PARTITION_SAMPLES,
    Baseline,
    EnergyModel,
    NormalizingFlow,
    Training,
    WassersteinGAN,
)
from tasks.density.networks import Networks
from tasks.density.paper import JointJeffreys
from tasks.errors import InputError

#: What a method is called in tables and plots.
LABELS = {
    "nf": "NF, maximum likelihood",
    "ebm": "EBM alone, importance sampling",
    "ebm_langevin": "EBM alone, Langevin",
    "wgan": "WGAN-GP, flow generator",
    "jeffreys": "ours (JeffreysDensityEstimator)",
    "dual": "the paper's algorithm, dual variables",
    "penalty": "the paper's algorithm, fixed weights",
}
#: Stages of `JeffreysDensityEstimator`, each of a third of its epochs.
NUM_STAGES = 3
LogProb = Callable[[Tensor], Tensor]


@dataclass
class Fitted:
    """A method fitted to samples.

    Attributes:
        densities: Log density of every model of the method at its best epoch on
            validation data: `"main"`, and of ours also `"proxy"` and `"refined"`.
        sample: Draws samples of the main model.
        curve: Lists of equal length: `"epoch"`, test `"nll"` of the main model,
            `"log_partition"` of the energy where there is one.
        seconds: Processor time of the training, without the recording.
    """

    densities: dict[str, LogProb]
    sample: Callable[[int], Tensor]
    curve: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = math.nan


class _Recorder:
    """Records the test log-likelihood every few epochs.

    Args:
        test: Samples of shape `(num, dim)`.
        every: Epochs from one entry to the next.
    """

    def __init__(self, test: Tensor, every: int) -> None:
        self.test = test
        self.every = every
        self.curve: dict[str, list[float]] = {
            "epoch": [],
            "nll": [],
            "log_partition": [],
        }
        self.seconds = 0.0

    def is_due(self, epoch: int) -> bool:
        return (epoch + 1) % self.every == 0

    def add(self, epoch: int, log_prob: LogProb, log_partition: float) -> None:
        self.curve["epoch"].append(epoch + 1)
        self.curve["nll"].append(mean_nll(log_prob, self.test))
        self.curve["log_partition"].append(log_partition)


@torch.no_grad()
def mean_nll(log_prob: LogProb, theta: Tensor) -> float:
    """Return the mean negative log density, infinite where it is not a number."""
    nll = -log_prob(theta).mean().item()
    return math.inf if math.isnan(nll) else nll


def fit(
    method: str,
    train: np.ndarray,
    test: np.ndarray,
    training: Training,
    networks: Networks,
    seed: int,
    weights: tuple[float, float, float] | None = None,
    every: int = 10,
) -> Fitted:
    """Fit a method to samples.

    Args:
        method: One of `LABELS`.
        train: Samples of shape `(num, dim)`; a tenth is held back for validation.
        test: Samples for the recorded log-likelihood.
        training: Epochs, batch size and learning rate.
        networks: Sizes of the networks.
        seed: Seed of networks and training.
        weights: Weights of the penalty form.
        every: Epochs from one entry of the curve to the next.

    Raises:
        InputError: If the method is unknown.
    """
    if (weights is not None) != (method == "penalty"):
        raise InputError("weights belong to the penalty form, and it needs them.")
    if method not in LABELS:
        raise InputError(f"there is no method {method!r}; known: {', '.join(LABELS)}.")
    theta = torch.as_tensor(train, dtype=torch.float32)
    points = torch.as_tensor(test, dtype=torch.float32)
    recorder = _Recorder(points, min(every, training.epochs))
    torch.manual_seed(seed)
    start = time.process_time()
    if method == "jeffreys":
        fitted = _fit_jeffreys(theta, training, networks, seed, recorder)
    else:
        model = _baseline(method, networks, training, weights)
        fitted = _fit_baseline(model, theta, recorder)
    fitted.seconds = time.process_time() - start - recorder.seconds
    fitted.curve = recorder.curve
    return fitted


def _baseline(
    method: str,
    networks: Networks,
    training: Training,
    weights: tuple[float, float, float] | None,
) -> Baseline:
    if method == "nf":
        return NormalizingFlow(networks, training)
    if method == "wgan":
        return WassersteinGAN(networks, training)
    if method in ("dual", "penalty"):
        return JointJeffreys(networks, training, weights)
    sampler = "langevin" if method == "ebm_langevin" else "importance"
    return EnergyModel(networks, training, sampler)


def _fit_baseline(model: Baseline, theta: Tensor, recorder: _Recorder) -> Fitted:
    best: dict[str, Any] = {"nll": math.inf, "model": None}

    def on_epoch(epoch: int) -> None:
        # Evaluation draws samples, but must not change the training.
        state, start = torch.get_rng_state(), time.process_time()
        nll = mean_nll(model.log_prob, model.validation)
        if nll < best["nll"] or best["model"] is None:
            best.update(nll=nll, model=_networks_of(model))
        if recorder.is_due(epoch):
            recorder.add(epoch, model.log_prob, model.log_partition())
        recorder.seconds += time.process_time() - start
        torch.set_rng_state(state)

    model.fit(theta, on_epoch)
    for name, state in best["model"].items():
        getattr(model, name).load_state_dict(state)
    densities: dict[str, LogProb] = {"main": model.log_prob}
    if isinstance(model, JointJeffreys):
        densities["proxy"] = model.energy_log_prob
    return Fitted(densities, model.sample)


def _networks_of(model: Baseline) -> dict[str, dict[str, Tensor]]:
    """Return copies of the parameters of the density model."""
    return {
        name: deepcopy(part.state_dict())
        for name, part in vars(model).items()
        if name in ("flow", "energy")
    }


def _fit_jeffreys(
    theta: Tensor,
    training: Training,
    networks: Networks,
    seed: int,
    recorder: _Recorder,
) -> Fitted:
    density = JeffreysDensityEstimator(
        networks.build_flow,
        energy=networks.energy(),
        training_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        # Every stage is as long as the training of the others; nothing stops earlier.
        stop_after_epochs=NUM_STAGES * training.epochs,
        max_num_epochs=NUM_STAGES * training.epochs,
        random_state=seed,
    )

    def on_epoch(epoch: int, estimator: JeffreysEstimator) -> None:
        if not recorder.is_due(epoch):
            return
        start = time.process_time()
        x = torch.zeros(1, 1)

        def log_prob(points: Tensor) -> Tensor:
            return estimator.flow.log_prob(points.unsqueeze(1), x)[:, 0]

        partition = estimator.proxy.log_partition(
            x, estimator.flow, NUM_PARTITION_SAMPLES // 2
        )
        recorder.add(epoch, log_prob, partition.value.item())
        recorder.seconds += time.process_time() - start

    with warnings.catch_warnings():
        # The number of epochs is the budget, not a failure to converge.
        warnings.filterwarnings("ignore", "Maximum number of epochs")
        density.fit(theta.numpy(), on_epoch=on_epoch)

    def sample(num_samples: int) -> Tensor:
        drawn = density.set_params(model="flow").sample(num_samples, seed)
        return torch.as_tensor(drawn, dtype=torch.float32)

    def log_prob_of(model: str) -> LogProb:
        def log_prob(points: Tensor) -> Tensor:
            return density.set_params(model=model).log_prob(points)

        return log_prob

    names = {"main": "flow", "proxy": "proxy", "refined": "refined"}
    return Fitted({key: log_prob_of(model) for key, model in names.items()}, sample)


def curve_text(curve: dict[str, list[float]]) -> str:
    """Return a curve as JSON text with five digits."""
    return json.dumps({
        name: [float(f"{value:.5g}") for value in values]
        for name, values in curve.items()
    })
