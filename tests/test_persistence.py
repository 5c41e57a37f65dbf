"""Saving, loading and resuming."""

import io
import os
import pickle
import pickletools
import random
import resource
import signal
import subprocess
import sys
import warnings
import zipfile
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import (
    PRIOR,
    X_O,
    StatefulEmbedding,
    assert_epochs_are_finite,
    assert_equal,
    interrupt_before,
    make,
    outcome,
    simulate,
    simulator,
    state_of,
    train,
)
from sbi.inference import simulate_for_sbi
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import PermutationInvariantEmbedding
from sbi.utils import BoxUniform, RestrictedPrior, process_prior
from torch import nn
from torch.distributions import Gamma, MultivariateNormal, Normal

from sbi_jeffreys import (
    AdaptiveWeights,
    FixedWeights,
    JeffreysObjective,
    RefinedPosterior,
    energy_nn,
    persistence,
)
from sbi_jeffreys.candidates import FlowCandidates
from sbi_jeffreys.persistence import copy_of_networks
from sbi_jeffreys.pooled_energy import PooledEnergy
from sbi_jeffreys.stages import Stage

pytestmark = pytest.mark.filterwarnings(
    "ignore:Maximum number of epochs",
    "ignore:When the inference object is pickled",
    "ignore:Training was interrupted",
)


def train_until(epoch, inference, num_epochs, data=None, **kwargs):
    """Train, but be interrupted after some of the epochs."""
    interrupt_before(inference, epoch)
    with pytest.warns(UserWarning, match=f"interrupted after {epoch} epochs"):
        return train(inference, num_epochs, data, **kwargs)


def disturb():
    """What another process would have done to the random numbers."""
    torch.manual_seed(77)
    np.random.seed(77)


# -------------------------------------------------------------------- the user's way

NUMPY_WEIGHTS = AdaptiveWeights(smoothing=np.float64(0.8))


@pytest.mark.parametrize("epochs", [3, 27])
def test_settings_may_be_numbers_of_numpy(tmp_path, epochs):
    """A rate of `np.geomspace` costs neither the file nor the state of a training."""
    options = {"learning_rate": np.float64(5e-3), "stop_after_epochs": 2}
    expected = make()
    train(expected, 30, simulate(), stop_after_epochs=2)
    interrupted = make(weights=NUMPY_WEIGHTS)
    train_until(epochs, interrupted, 30, simulate(), **options)
    interrupted.save(tmp_path / "training.pt")
    loaded = make(weights=NUMPY_WEIGHTS).load(tmp_path / "training.pt")
    for inference in (interrupted, loaded):
        train(inference, 30, resume_training=True, **options)
        assert_equal(state_of(inference._neural_net), state_of(expected._neural_net))
        assert inference.summary["trust"] == expected.summary["trust"]


def test_a_fitted_estimator_is_loaded(tmp_path):
    inference = make()
    train(inference, 4, simulate())
    path = tmp_path / "fit.pt"
    inference.save(path)
    loaded = make()
    assert loaded.load(path) is loaded
    assert_equal(outcome(loaded), outcome(inference))
    assert_equal(loaded.summary, inference.summary)
    theta = PRIOR.sample((20,))
    for sample_with in ("direct", "refined"):
        samples, densities = [], []
        for each in (inference, loaded):
            torch.manual_seed(3)
            posterior = each.build_posterior(sample_with=sample_with)
            posterior.set_default_x(X_O)
            samples.append(posterior.sample((50,), show_progress_bars=False))
            densities.append(posterior.log_prob(theta))
        assert torch.equal(*samples)
        assert torch.equal(*densities)
    assert not loaded._neural_net.training


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    inference, loaded = make(), make()
    train(inference, 2, simulate())
    torch.manual_seed(5)
    np.random.seed(5)
    inference.save(tmp_path / "fit.pt")
    loaded.load(tmp_path / "fit.pt")
    drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(drawn[0], torch.rand(3))
    assert (drawn[1] == np.random.rand(3)).all()


def test_without_simulations_the_file_is_small_and_gives_posteriors(tmp_path):
    theta, x = simulate()
    x = torch.cat((x, torch.randn(len(x), 500)), 1)
    inference = make()
    train(inference, 2, (theta, x))
    whole, small = tmp_path / "whole.pt", tmp_path / "small.pt"
    inference.save(whole)
    inference.save(small, simulations=False)
    assert small.stat().st_size < whole.stat().st_size / 3
    loaded = make().load(small)
    assert_equal(outcome(loaded), outcome(inference))
    base, own = (i._neural_net.proxy.base for i in (loaded, inference))
    assert torch.equal(base.scale, own.scale)
    samples = []
    for each in (inference, loaded):
        torch.manual_seed(3)
        posterior = each.build_posterior(sample_with="refined")
        assert isinstance(posterior, RefinedPosterior)
        samples.append(posterior.sample((50,), x=x[:1]))
    assert torch.equal(*samples)
    with pytest.raises(ValueError, match="no training to resume"):
        loaded.append_simulations(theta, x).train(resume_training=True)
    again = make().load(small)
    with pytest.raises(ValueError, match="simulations=False"):
        again.save(tmp_path / "again.pt")
    again.save(tmp_path / "again.pt", simulations=False)
    assert_equal(outcome(make().load(tmp_path / "again.pt")), outcome(inference))


def mixed_outputs(theta):
    """Return outputs of all kinds that a likelihood tells apart."""
    rates = theta.exp()
    return torch.stack(
        [
            theta[:, 0] + 0.5 * torch.randn(len(theta)),
            theta[:, 1] + 0.5 * torch.randn(len(theta)),
            torch.poisson(50 * rates[:, 0]),  # on a lattice, as good as continuous
            torch.bernoulli(theta[:, 1].sigmoid()),
            torch.poisson(rates[:, 1]).clamp_max(4) - 2,
            torch.full((len(theta),), 7.0),
        ],
        1,
    )


OUTPUTS = {
    "continuous": simulator,
    "one": lambda theta: simulator(theta)[:, :1],
    "discrete": lambda theta: torch.bernoulli(theta.sigmoid()),
    "mixed": mixed_outputs,
}


@pytest.mark.parametrize("simulations", [True, False])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_the_factors_of_the_proxy_are_loaded(tmp_path, outputs, simulations):
    theta, _ = simulate()
    x = OUTPUTS[outputs](theta)
    inference = make()
    train(inference, 8, (theta, x), learning_rate=2e-2)
    proxy = inference._neural_net.proxy
    assert isinstance(proxy, PooledEnergy)
    assert len(proxy.likelihoods) == (4 if outputs in ("continuous", "mixed") else 2)
    path = tmp_path / "fit.pt"
    inference.save(path, simulations=simulations)
    loaded = make().load(path)
    # Whatever weight they were given, every factor is there.
    for each in (proxy, loaded._neural_net.proxy):
        each.weights.copy_(torch.linspace(0.5, 1.0, len(each.weights)))
    points = PRIOR.sample((7, len(x)))
    with torch.no_grad():
        log_q, own = (
            each._neural_net.proxy.log_unnormalized(points, x)
            for each in (loaded, inference)
        )
    assert own.isfinite().all()
    assert own.std() > 0
    assert_equal(log_q, own)
    densities = []
    for each in (inference, loaded):
        torch.manual_seed(3)
        posterior = each.build_posterior(sample_with="refined").set_default_x(x[:1])
        densities.append(posterior.log_prob(theta[:20]))
    assert_equal(*densities)


def test_pickling_goes_on_as_with_npe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # unpickled trainers log where they are
    whole, inference = make(), make()
    train(whole, 7, simulate())
    train_until(4, inference, 7, simulate())
    inference = pickle.loads(pickle.dumps(inference))
    inference._show_progress_bars = False
    train(inference, 7, resume_training=True, seed=8)
    assert_equal(outcome(inference), outcome(whole))
    inference.save("fit.pt")
    assert_equal(outcome(make().load("fit.pt")), outcome(whole))
    with pytest.raises(ValueError, match="lost its builders"):
        inference.load("fit.pt")


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_copy_has_no_builders(is_trained):
    # sbi's words are that None is not callable.
    original = make()
    original.append_simulations(*simulate())
    if is_trained:
        train(original)
    copied = deepcopy(original)
    options = {"retrain_from_scratch": True, "force_first_round_loss": True}
    with pytest.raises(ValueError, match="copied JeffreysNPE has lost its builders"):
        train(copied, **(options if is_trained else {}))
    train(original, **(options if is_trained else {}))


class Counted(nn.Linear):
    """It keeps more than tensors: how often it has learnt."""

    count = 0

    def forward(self, x):
        self.count += self.training
        return super().forward(x)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def test_networks_that_keep_more_than_tensors(tmp_path):
    def embedded():
        flow = posterior_nn("maf", embedding_net=Counted(2, 3), hidden_features=8)
        return make(density_estimator=flow)

    expected = embedded()
    train(expected, 8, simulate())
    inference = embedded()
    train_until(2, inference, 8, simulate())
    inference.save(tmp_path / "training.pt")
    loaded = embedded().load(tmp_path / "training.pt")
    train(loaded, 8, resume_training=True)
    counts = [
        [m.count for m in made._neural_net.flow.modules() if isinstance(m, Counted)]
        for made in (loaded, expected)
    ]
    assert counts[0] == counts[1] != [0]


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="call .train"):
        make().save(tmp_path / "fit.pt")
    assert not list(tmp_path.iterdir())


def test_nothing_to_resume():
    inference = make().append_simulations(*simulate())
    with pytest.raises(ValueError, match="no training to resume"):
        inference.train(resume_training=True)
    train(inference, 2)


# ------------------------------------------------------------- resumed as uninterrupted


def shared_embedding():
    embedding = StatefulEmbedding()
    return {
        "density_estimator": posterior_nn(
            "maf", hidden_features=8, num_transforms=2, embedding_net=embedding
        ),
        "energy_estimator": energy_nn(8, 1, likelihood="auto", embedding_net=embedding),
    }


class RandomFeatures(nn.Module):
    """An embedding whose state dict does not tell all: a careless user's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        if not hasattr(self, "directions"):
            self.directions = torch.randn(2, 5)
        return self.scale * (x @ self.directions)


class ScipyPrior:
    """It draws from numpy's random numbers."""

    def sample(self, sample_shape=()):
        return scipy.stats.norm.rvs(size=(*sample_shape, 2))

    def log_prob(self, theta):
        return scipy.stats.norm.logpdf(theta).sum(-1)


def priors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sbi says that it wraps them
        yield process_prior(ScipyPrior())[0]
        yield process_prior([
            Gamma(torch.tensor([2.0]), torch.tensor([1.0])),
            Normal(torch.zeros(1), torch.ones(1)),
        ])[0]


SCIPY, HALF_BOUNDED = priors()


def restricted_prior():
    """A prior with a hole where its mean is, and an estimated constant."""
    return RestrictedPrior(
        PRIOR, lambda theta: theta.abs().sum(-1) > 1.0, sample_with="rejection"
    )


CASES = {
    "maf": dict,
    "nsf": lambda: {
        "density_estimator": posterior_nn("nsf", hidden_features=8, num_transforms=2)
    },
    "zuko_nsf": lambda: {
        "density_estimator": posterior_nn(
            "zuko_nsf", hidden_features=8, num_transforms=2
        )
    },
    "fixed": lambda: {"weights": "fixed"},
    "embedding": shared_embedding,
    "no likelihood": lambda: {"energy_estimator": energy_nn(8, 1, likelihood="none")},
    "dropout": lambda: {
        "energy_estimator": energy_nn(8, 1, dropout=0.3, likelihood="auto")
    },
    "lebesgue": lambda: {
        "energy_estimator": energy_nn(8, 1, base_measure="lebesgue", likelihood="auto")
    },
    "scipy": lambda: {"prior": SCIPY},
    "half-bounded": lambda: {"prior": HALF_BOUNDED},
    "restricted": lambda: {"prior": restricted_prior()},
    "random network": lambda: {
        "density_estimator": posterior_nn(
            "maf", hidden_features=8, num_transforms=2, embedding_net=RandomFeatures()
        )
    },
}


@pytest.mark.parametrize("epochs", range(1, 12))
def test_resumed_training_equals_uninterrupted(tmp_path, epochs):
    data = simulate()
    whole, part, loaded = make(), make(), make()
    # So seeded that the proxy is worth following.
    train(whole, 12, data, learning_rate=2e-2, seed=2)
    train_until(epochs, part, 12, data, learning_rate=2e-2, seed=2)
    path = tmp_path / "training.pt"
    part.save(path)
    loaded.load(path)
    disturb()
    train(loaded, 12, resume_training=True, seed=9, learning_rate=2e-2)
    assert_equal(outcome(loaded), outcome(whole))
    # As it does in the same process.
    train(part, 12, resume_training=True, seed=9, learning_rate=2e-2)
    assert_equal(outcome(part), outcome(whole))
    # Flows were compared by the same score.
    for inference in (loaded, part):
        assert inference._best.keys() == whole._best.keys()
        for name in whole._best:
            assert inference._best[name][:2] == whole._best[name][:2]
    assert whole._proxy_share > 0
    # In the midst of every stage, and at both ends.
    stages = [stage.value for stage in Stage for _ in range(3)]
    assert whole.summary["stage"] == stages
    assert whole._neural_net.proxy.weights[1:].any()
    assert whole.summary["trust"][-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 5, 7])
@pytest.mark.parametrize("case", CASES)
def test_resumed_training_equals_uninterrupted_for(tmp_path, case, epochs):
    inferences = []
    for until in (None, epochs):
        torch.manual_seed(1)  # embedding nets are made by the user
        options = CASES[case]()
        data = simulate(prior=options.get("prior", PRIOR))
        inferences.append(make(**options))
        if until is None:
            train(inferences[-1], 8, data)
        else:
            train_until(until, inferences[-1], 8, data)
    whole, part = inferences
    path = tmp_path / "training.pt"
    part.save(path)
    loaded = make(**CASES[case]()).append_simulations(*data)
    loaded.load(path)
    disturb()
    train(loaded, 8, resume_training=True, seed=9)
    assert_equal(outcome(loaded), outcome(whole))


def test_resumed_training_of_a_loader_with_keywords(tmp_path):
    data = simulate()
    kwargs = {"dataloader_kwargs": {"num_workers": 0}, "clip_max_norm": None}
    whole, part = make(), make()
    train(whole, 6, data, **kwargs)
    train_until(4, part, 6, data, **kwargs)
    part.save(tmp_path / "training.pt")
    loaded = make().load(tmp_path / "training.pt")
    train(loaded, 6, resume_training=True, seed=9, **kwargs)
    assert_equal(outcome(loaded), outcome(whole))


@pytest.mark.filterwarnings("ignore:No prior was given")
@pytest.mark.parametrize("append", [True, False])
def test_resumed_training_without_a_prior(tmp_path, append):
    data = simulate()
    whole, part = make(None), make(None)
    train(whole, 6, data)
    train_until(3, part, 6, data)
    part.save(tmp_path / "training.pt")
    loaded = make(None)
    if append:
        loaded.append_simulations(*data)
    loaded.load(tmp_path / "training.pt")
    train(loaded, 6, resume_training=True, seed=9)
    assert_equal(outcome(loaded), outcome(whole))
    posterior = loaded.build_posterior(sample_with="refined")
    assert posterior.sample((5,), x=X_O).isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"discard_prior_samples": True}, {"retrain_from_scratch": True}]
)
@pytest.mark.parametrize("epochs", [3, 5])  # of the likelihoods, and of the proxy
def test_resumed_training_of_a_later_round(tmp_path, options, epochs):
    def first_round(inference):
        train(inference, 3, simulate())
        proposal = inference.build_posterior().set_default_x(X_O)
        theta, x = simulate_for_sbi(simulator, proposal, 60, show_progress_bar=False)
        inference.append_simulations(theta, x, proposal=proposal)

    whole, part = make(), make()
    first_round(whole)
    train(whole, 7, **options)
    first_round(part)
    train_until(epochs, part, 7, **options)
    part.save(tmp_path / "training.pt")
    loaded = make().load(tmp_path / "training.pt")
    options = {"discard_prior_samples": options.get("discard_prior_samples", False)}
    train(loaded, 7, resume_training=True, seed=9, **options)
    assert_equal(outcome(loaded), outcome(whole))
    # And another round follows.
    proposal = loaded.build_posterior().set_default_x(X_O)
    theta, x = simulate_for_sbi(simulator, proposal, 60, show_progress_bar=False)
    loaded.append_simulations(theta, x, proposal=proposal)
    train(loaded, 2)
    assert loaded._data_round_index == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:The proposal you passed")
@pytest.mark.parametrize("simulations", [True, False])
def test_the_proxy_is_where_simulations_of_a_later_round_are(tmp_path, simulations):
    """The observation contradicts the prior: eight of its standard deviations out."""
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    proposal = MultivariateNormal(torch.full((2,), 8.0), 0.3 * torch.eye(2))
    inference = make(prior)
    train(inference, 3, simulate(prior=prior))
    theta, x = simulate(prior=proposal)
    assert (prior.log_prob(theta) < inference._estimator.proxy.base.floor).all()
    inference.append_simulations(theta, x, proposal=proposal)
    train(inference, 6)
    assert_epochs_are_finite(inference.summary)
    inference.save(tmp_path / "fit.pt", simulations=simulations)
    for each in (inference, make(prior).load(tmp_path / "fit.pt")):
        base = each._estimator.proxy.base
        torch.testing.assert_close(base.log_prob(theta), prior.log_prob(theta))
        posterior = each.build_posterior(sample_with="refined").set_default_x(x[:1])
        assert posterior.log_prob(theta).isfinite().all()


def test_a_training_that_had_converged_is_not_changed(tmp_path):
    inference = make()
    train(inference, 100, simulate(), stop_after_epochs=2, learning_rate=5e-2)
    before = outcome(inference)
    assert len(before["summary"]["trust"]) < 100
    assert before["summary"]["stage"][-1] == "distillation"
    inference.save(tmp_path / "fit.pt")
    loaded = make().load(tmp_path / "fit.pt")
    train(loaded, 100, resume_training=True, stop_after_epochs=2)
    assert_equal(outcome(loaded), before)


def test_resuming_leaves_the_random_numbers_of_the_caller_alone():
    inference = make()
    train(inference, 2, simulate())
    torch.manual_seed(4)
    expected = torch.rand(3)
    train(inference, 3, resume_training=True, seed=4)
    assert torch.equal(torch.rand(3), expected)


# -------------------------------------------------------------------------- checkpoints

SCRIPT = """
import os, signal, sys, torch
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn, losses, persistence

torch.set_num_threads(1)
losses.NUM_CONDITIONS = 200  # as in conftest.py
path, killed_at = sys.argv[1], int(sys.argv[2])
persistence.CHECKPOINT_TIME_SHARE = 1e9  # after every epoch
prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
torch.manual_seed(0)
theta = prior.sample((120,))
x = theta + 0.5 * torch.randn_like(theta)
inference = JeffreysNPE(
    prior,
    posterior_nn("maf", hidden_features=8, num_transforms=2),
    energy_estimator=energy_nn(8, 1, likelihood="auto"),
    tracker=NoTracker(),
    show_progress_bars=False,
)
inference.append_simulations(theta, x)
step, num_steps = inference._step, 0


def killing_step(*args):
    global num_steps
    num_steps += 1
    if num_steps == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)


inference._step = killing_step
resume = os.path.exists(path)
if resume:
    inference.load(path)
torch.manual_seed(7 if resume else 1)
inference.train(
    training_batch_size=40,
    learning_rate=5e-3,
    max_num_epochs=7,
    resume_training=resume,
    checkpoint=path,
)
"""


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with(tmp_path):
    path = tmp_path / "training.pt"

    def run(killed_at):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, path, killed_at]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    killed = run(14)  # two steps an epoch: in the seventh
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partly = make().load(path)
    assert len(partly.summary["trust"]) == 6
    assert partly.build_posterior().sample((5,), x=X_O).isfinite().all()
    done = run(0)
    assert done.returncode == 0, done.stderr
    expected = make()
    train(expected, 8, simulate())
    assert_equal(outcome(make().load(path)), outcome(expected))


@pytest.mark.parametrize("num_epochs", [2, 5, 8, 11])
def test_an_unfinished_training_gives_its_best_networks(
    tmp_path, monkeypatch, num_epochs
):
    # What a process that is killed after so many epochs leaves behind.
    monkeypatch.setattr(persistence, "CHECKPOINT_TIME_SHARE", 1e9)
    path, kept = tmp_path / "training.pt", tmp_path / "kept.pt"
    inference = make()
    train_epoch = inference._train_epoch

    def copying(*args):
        if inference.epoch == num_epochs:
            kept.write_bytes(path.read_bytes())
        return train_epoch(*args)

    inference._train_epoch = copying
    train(inference, 12, simulate(), learning_rate=2e-2, checkpoint=path)
    loading = make()
    torch.manual_seed(1)  # of the choice of the proxy's weights
    loaded = loading.load(kept)
    expected = make()
    train_until(num_epochs, expected, 12, simulate(), learning_rate=2e-2)
    assert len(loaded.summary["trust"]) == num_epochs
    networks = [copy_of_networks(i._neural_net) for i in (loaded, expected)]
    # Chosen with other random numbers, on eight simulations.
    weights = [states["proxy"].pop("weights") for states in networks]
    torch.testing.assert_close(*weights, atol=0.2, rtol=0)
    assert_equal(*networks)
    assert loaded._neural_net.exponent == pytest.approx(
        expected._neural_net.exponent, abs=0.2
    )
    assert_equal(outcome(make().load(path)), outcome(inference))


def test_checkpoints_take_little_time(tmp_path, monkeypatch):
    clock, written = [0.0], []
    monkeypatch.setattr(persistence.time, "monotonic", lambda: clock[0])

    def slow_write(path, content):
        clock[0] += 1.0
        written.append(clock[0])

    monkeypatch.setattr(persistence, "write", slow_write)
    checkpoint = persistence.Checkpoint(tmp_path / "training.pt")
    inference = make()
    train(inference, 2, simulate())
    for _ in range(1000):
        clock[0] += 0.1  # an epoch
        checkpoint.write(inference)
    share = len(written) / clock[0]
    assert 0.03 < share < 0.06
    num = len(written)
    checkpoint.write(inference, last=True)
    assert len(written) == num + 1


def test_training_is_the_same_with_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(persistence, "CHECKPOINT_TIME_SHARE", 1e9)
    outcomes = []
    for kwargs in ({}, {"checkpoint": str(tmp_path / "training.pt")}):
        inference = make()
        train(inference, 4, simulate(), **kwargs)
        outcomes.append(outcome(inference))
    assert_equal(*outcomes)
    assert [p.name for p in tmp_path.iterdir()] == ["training.pt"]


def test_a_checkpoint_that_cannot_be_written_is_said_at_once(tmp_path):
    for path in (tmp_path / "none" / "training.pt", tmp_path):
        inference = make().append_simulations(*simulate())
        with pytest.raises(OSError, match="cannot be written"):
            train(inference, 100_000, checkpoint=path)
    train(inference, 2)  # and can be mended


# ------------------------------------------------------------------------ a full disk


@contextmanager
def full_disk(free=3000):
    """Let no file grow beyond some bytes: the system's own error, in mid-file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_file_of_before(tmp_path):
    inference = make()
    train(inference, 2, simulate())
    path = tmp_path / "fit.pt"
    inference.save(path)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match=f"{path} cannot be written"):
        inference.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    inference.save(path)


def test_a_full_disk_does_not_cost_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(persistence, "CHECKPOINT_TIME_SHARE", 1e9)
    inference = make()
    path = tmp_path / "training.pt"
    with full_disk(), pytest.warns(UserWarning, match="Training goes on") as caught:
        train(inference, 4, simulate(), checkpoint=path)
    assert sum("checkpoint failed" in str(w.message) for w in caught) == 1
    assert not list(tmp_path.iterdir())
    expected = make()
    train(expected, 4, simulate())
    assert_equal(outcome(inference), outcome(expected))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_save_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, error):
    inference = make()
    train(inference, 2, simulate())
    path = tmp_path / "fit.pt"
    path.write_bytes(b"before")

    def interrupted(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(error):
        inference.save(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_paths(tmp_path, monkeypatch):
    inference = make()
    train(inference, 2, simulate())
    monkeypatch.chdir(tmp_path)
    inference.save("fit")  # relative, a string, no suffix
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.pt").symlink_to(tmp_path / "target.pt")
    inference.save(tmp_path / "folder" / "link.pt")
    assert (tmp_path / "folder" / "link.pt").is_symlink()
    for path in ("fit", "target.pt", "folder/link.pt"):
        assert_equal(outcome(make().load(path)), outcome(inference))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "fit").stat().st_mode & 0o777 == 0o666 & ~umask
    for path in ("folder", "none/fit.pt", "fit/fit.pt"):
        with pytest.raises(OSError, match="cannot be written"):
            inference.save(path)


# ------------------------------------------------------------------------- wrong files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An inference object and its file, made once."""
    inference = make()
    train(inference, 2, simulate())
    path = tmp_path_factory.mktemp("saved") / "fit.pt"
    inference.save(path)
    return inference, path


def assert_refused(path, match, inference=None, error=ValueError):
    """Loading must raise, and leave the object as it was, ready for use."""
    inference = make() if inference is None else inference
    before = dict(vars(inference))
    state = torch.get_rng_state()
    with pytest.raises(error, match=match):
        inference.load(path)
    assert vars(inference) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_no_file(tmp_path):
    assert_refused(tmp_path / "none.pt", "no such file", error=FileNotFoundError)
    assert_refused(tmp_path, "It is a folder", error=FileNotFoundError)


def test_truncated_files(saved, tmp_path):
    content = saved[1].read_bytes()
    path = tmp_path / "fit.pt"
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert_refused(path, "truncated|damaged")


def test_damaged_files(saved, tmp_path):
    """A flipped byte is noticed, or is none of the content."""
    content = saved[1].read_bytes()
    expected = outcome(saved[0])
    path = tmp_path / "fit.pt"
    rng = random.Random(0)
    num_refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = make().load(path)
        except ValueError as err:
            assert "damaged" in str(err) or "truncated" in str(err)
            num_refused += 1
        else:
            assert_equal(outcome(loaded), expected)
    assert num_refused > 30


class Exploit:
    """Runs code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def wrong_files(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    yield "numpy.npz", buffer.getvalue()
    yield "notes.txt", b"hello\n" * 1000
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "hello")
    yield "archive.zip", buffer.getvalue()
    for name, value in (
        ("tensor.pt", torch.zeros(3)),
        ("state.pt", {"flow.weight": torch.zeros(3)}),
        ("module.pt", nn.Linear(2, 2)),
        ("exploit.pt", Exploit(tmp_path / "exploited")),
        ("hidden.pt", {"format": persistence.FORMAT, "a": Exploit(tmp_path / "ex")}),
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        yield name, buffer.getvalue()
    yield "exploit.pickle", pickle.dumps(Exploit(tmp_path / "exploited"))


def test_files_of_others(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in wrong_files(tmp_path):
        (folder / name).write_bytes(content)
        assert_refused(folder / name, "JeffreysNPE.save has written")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]  # no code has run


def test_another_version(saved, tmp_path):
    content = torch.load(saved[1], weights_only=True)
    path = tmp_path / "fit.pt"
    # Of version 1 the stages were others, version 2 had no average of weights, and
    # version 3 no surrogates of the likelihood; version 4 had synthetic conditions, and
    # version 5 energies without a bound; version 6 saw all outputs; version 7 had flows
    # without a scale, and version 8 normal scores of standard scores; version 9 did not
    # say the preset; version 10 had no correlated surrogates, and version 11 no outputs
    # that they imagine; those of version 12 had no bounds.
    assert persistence.FORMAT_VERSION == 13
    for version in (14, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, None):
        torch.save({**content, "version": version, "written_by": "9.9.9"}, path)
        assert_refused(path, f"format version {version}.*sbi_jeffreys 9.9.9")


def test_files_hold_nothing_but_data(saved):
    """Of the file's own pickle, all that is named is torch's and the standard's."""
    with zipfile.ZipFile(saved[1]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        data = archive.read(name)
    named = {
        argument.replace(" ", ".")
        for opcode, argument, _ in pickletools.genops(data)
        if opcode.name == "GLOBAL"
    }
    assert named <= {
        "torch._utils._rebuild_tensor_v2",
        "torch.FloatStorage",
        "torch.LongStorage",
        "torch.BoolStorage",
        "torch.ByteStorage",
        "collections.OrderedDict",
    }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"density_estimator": posterior_nn("maf", hidden_features=9)},
            "flow of the file does not fit.*same density_estimator",
        ),
        ({"density_estimator": "nsf"}, "flow of the file does not fit"),
        (
            {"energy_estimator": energy_nn(9, 1, likelihood="auto")},
            r"proxy .* \(8,\).* \(9,\)",
        ),
        (
            {"energy_estimator": energy_nn(8, 2, likelihood="auto")},
            "absent in the file",
        ),
        (
            {"energy_estimator": energy_nn(8, 1, likelihood="none")},
            "proxy of the file does not fit.*likelihoods.* absent here",
        ),
        (
            {"prior": BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))},
            "prior given here is not the one",
        ),
        (
            {"prior": BoxUniform(-2 * torch.ones(3), 2 * torch.ones(3))},
            "of 2 parameters, but the prior given here is over 3",
        ),
        ({"prior": MultivariateNormal(torch.zeros(2), torch.eye(2))}, "not the one"),
        ({"prior": None}, "trained with a prior, but this JeffreysNPE has none"),
        (
            {"weights": "fixed"},
            "AdaptiveWeights, but this JeffreysNPE has FixedWeights",
        ),
        ({"weights": FixedWeights((1, 2, 3))}, "has FixedWeights.*same weights"),
        (
            {"preset": "fast"},
            "preset='accurate', but this JeffreysNPE has 'fast'",
        ),
        (
            {"objective": JeffreysObjective(8, 16)},
            "num_flow_samples=16, but this JeffreysNPE has 8",
        ),
        (
            {"objective": JeffreysObjective(num_reverse_samples=2)},
            "num_reverse_samples=1, but this JeffreysNPE has 2",
        ),
    ],
)
def test_an_object_made_otherwise(saved, options, match):
    assert_refused(saved[1], match, make(**options))


def test_networks_alone_are_loaded_with_any_preset(saved, tmp_path):
    saved[0].save(tmp_path / "small.pt", simulations=False)
    loaded = make(preset="fast").load(tmp_path / "small.pt")
    assert_equal(outcome(loaded), outcome(saved[0]))


def test_other_simulations(saved):
    theta, x = simulate()
    for data, name in (
        ((theta, x + 1), "x"),
        ((theta[:50], x[:50]), "theta"),
        (simulate(seed=3), "theta"),
    ):
        inference = make().append_simulations(*data)
        assert_refused(saved[1], f"differ in {name} from those of the file", inference)
        train(inference, 2)  # and it serves
    loaded = make().append_simulations(theta, x).load(saved[1])
    assert len(loaded.get_simulations()[0]) == len(theta)
    assert_equal(outcome(loaded), outcome(saved[0]))


def test_the_same_simulations_with_missing_values(tmp_path):
    def padded():
        theta, x = simulate()
        x = x.unsqueeze(1).repeat(1, 3, 1)
        x[::2, 2] = torch.nan  # two trials, not three
        return theta, x

    def make_for_trials():
        embedding = PermutationInvariantEmbedding(
            nn.Linear(2, 4), trial_net_output_dim=4, num_hiddens=8, output_dim=4
        )
        networks = {"embedding_net": embedding, "z_score_x": "none"}
        return make(
            density_estimator=posterior_nn(
                "maf", hidden_features=8, num_transforms=2, **networks
            ),
            energy_estimator=energy_nn(8, 1, **networks),
        )

    def append(inference, theta, x):
        return inference.append_simulations(theta, x, exclude_invalid_x=False)

    theta, x = padded()
    inference = append(make_for_trials(), theta, x)
    train(inference, 3)
    inference.save(tmp_path / "fit.pt")
    loaded = append(make_for_trials(), theta, x).load(tmp_path / "fit.pt")
    assert_equal(outcome(loaded), outcome(inference))
    train(inference, 5, resume_training=True)
    train(loaded, 5, resume_training=True)
    assert_equal(outcome(loaded), outcome(inference))
    # NaN for a number, or a number for NaN, is another simulation.
    for row, value in ((0, 1.0), (1, torch.nan)):
        other = x.clone()
        other[row, 2] = value
        assert_refused(
            tmp_path / "fit.pt", "differ in x", append(make_for_trials(), theta, other)
        )


def test_a_failed_load_does_not_harm_a_trained_object(saved):
    inference = make(energy_estimator=energy_nn(9, 1, likelihood="auto"))
    train(inference, 2, simulate())
    before = outcome(inference)
    assert_refused(saved[1], "does not fit", inference)
    assert_equal(outcome(inference), before)
    train(inference, 4, resume_training=True)


# ----------------------------------------------------------------------------- devices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_from_one_device_to_another(tmp_path, devices):
    priors = [
        BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2), device=device)
        for device in devices
    ]
    first = make(priors[0], device=devices[0])
    train(first, 4, simulate())
    first.save(tmp_path / "training.pt")
    second = make(priors[1], device=devices[1]).load(tmp_path / "training.pt")
    theta, x = simulate(10)
    losses = [
        inference._neural_net.loss(theta.to(device), x.to(device)).cpu()
        for inference, device in zip((first, second), devices, strict=True)
    ]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    train(second, 6, resume_training=True)
    assert len(second.summary["trust"]) == 6
    assert next(second._neural_net.parameters()).device.type == devices[1]


@pytest.mark.parametrize("num_new", [40, 200])
def test_trained_anew_after_a_file_without_simulations(tmp_path, num_new):
    """What the networks were built with is not among the simulations that follow."""
    first = make()
    train(first, 4, simulate(120))
    first.save(tmp_path / "small.pt", simulations=False)
    second = make().load(tmp_path / "small.pt")
    theta, x = simulate(num_new, seed=5)
    second.append_simulations(theta, x)
    train(second, 4, force_first_round_loss=True)
    second.save(tmp_path / "whole.pt")
    third = make().load(tmp_path / "whole.pt")
    assert_equal(outcome(third), outcome(second))


@pytest.mark.parametrize("simulations", [True, False])
def test_a_later_round_after_loading(tmp_path, simulations):
    """It begins as it would have without the file, with the candidate chosen before."""

    def candidates(theta, x):
        build = posterior_nn("maf", hidden_features=8, num_transforms=2)
        return FlowCandidates([build(theta, x) for _ in range(2)])

    first = make(density_estimator=candidates)
    train(first, 60, simulate(120), stop_after_epochs=2)
    first.save(tmp_path / "training.pt", simulations=simulations)
    second = make(density_estimator=candidates).load(tmp_path / "training.pt")
    proposal = first.build_posterior().set_default_x(X_O)
    for inference in (first, second):
        theta, x = simulate(60, seed=5)
        inference.append_simulations(theta, x, proposal=proposal)
        train(inference, 60, stop_after_epochs=2, discard_prior_samples=True)
    assert_equal(outcome(second), outcome(first))


def test_resumed_with_other_simulations():
    inference = make()
    train(inference, 4, simulate(120))
    theta, x = simulate(60, seed=5)
    proposal = inference.build_posterior().set_default_x(x[:1])
    inference.append_simulations(theta, x, proposal=proposal)
    train(inference, 4, discard_prior_samples=True, force_first_round_loss=True)
    with pytest.raises(ValueError, match="round 1 on, .* of round 0 on.*discard_prior"):
        train(inference, 6, resume_training=True, force_first_round_loss=True)


@pytest.mark.parametrize("proposed", [False, True])
def test_resumed_with_more_simulations(proposed):
    """sbi goes on without them and says nothing, even with the loss of a proposal."""
    inference = make()
    train(inference, 4, simulate(120))
    proposal = inference.build_posterior().set_default_x(X_O) if proposed else None
    inference.append_simulations(*simulate(60, seed=5), proposal=proposal)
    before = outcome(inference)
    with pytest.raises(ValueError, match="60 simulations were appended since"):
        train(inference, 6, resume_training=True)
    assert_equal(outcome(inference), before)
    # What the message advises.
    train(inference, 4, force_first_round_loss=not proposed)
    assert len(inference.train_indices) + len(inference.val_indices) == 180


def test_resumed_without_the_fraction_of_then():
    """The split is that of then; batches hold as many simulations of it as then."""
    expected, inference = make(), make()
    options = {"validation_fraction": 0.5, "training_batch_size": 200}
    train(expected, 8, simulate(120), **options)
    train_until(3, inference, 8, simulate(120), **options)
    train(inference, 8, resume_training=True, training_batch_size=200)
    assert_equal(outcome(inference), outcome(expected))


def test_resumed_from_scratch():
    """The optimizer of then does not know the new networks, which would not learn."""
    inference = make()
    train(inference, 4, simulate(120))
    before = outcome(inference)
    with pytest.raises(ValueError, match="give one of them"):
        train(inference, 6, resume_training=True, retrain_from_scratch=True)
    assert_equal(outcome(inference), before)
    train(inference, 6, resume_training=True)
    assert len(inference.summary["trust"]) == 6
