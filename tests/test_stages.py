"""The stages of training: who learns when, from what, and where it ends."""

import math
from typing import Any, Dict

import pytest
import torch
from helpers import (
    StatefulEmbedding,
    assert_epochs_are_finite,
    identical,
    interrupt_before,
    state_of,
    values_of,
)
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform

from sbi_jeffreys import (
    AdaptiveWeights,
    FixedWeights,
    JeffreysNPE,
    NoTracker,
    energy_nn,
    trainer,
)
from sbi_jeffreys.plots import plot_training
from sbi_jeffreys.stages import Stage

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Maximum number of epochs", "ignore:Training was interrupted"
    ),
    pytest.mark.usefixtures("without_averaging"),
]

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))


def make(shared=False, **kwargs):
    torch.manual_seed(0)
    embedding: Dict[str, Any] = {"embedding_net": StatefulEmbedding()} if shared else {}
    return JeffreysNPE(
        PRIOR,
        posterior_nn("maf", hidden_features=8, num_transforms=2, **embedding),
        energy_estimator=energy_nn(8, 1, **embedding),
        tracker=NoTracker(),
        show_progress_bars=False,
        **kwargs,
    )


def train(inference, num_epochs, **kwargs):
    torch.manual_seed(1)
    theta = PRIOR.sample((150,))
    x = theta + 0.5 * torch.randn(150, 2)
    if not inference._theta_roundwise:
        inference.append_simulations(theta, x)
    kwargs = {"training_batch_size": 45, "learning_rate": 1e-2, **kwargs}
    # sbi's budget is one short.
    return inference.train(max_num_epochs=num_epochs - 1, **kwargs)


def equal(a, b):
    return all(identical(a[name], b[name]) for name in a)


def record(inference):
    """Record both models before and after every epoch, and what was drawn for it."""
    states = []
    train_epoch = inference._train_epoch

    def both():
        estimator = inference._neural_net
        return state_of(estimator.flow), state_of(estimator.proxy)

    def recording_train(*args):
        before = both()
        loss = train_epoch(*args)
        drawn = {
            "proposals": inference._proposals.get("training"),
            "proxy samples": inference._proxy_samples.get("training"),
        }
        states.append((before, both(), drawn))
        return loss

    inference._train_epoch = recording_train
    return states


def split(state):
    """Return what of a state is the embedding's, and what is the model's own."""
    embedding = {k: v for k, v in state.items() if "embedding_net" in k}
    return embedding, {k: v for k, v in state.items() if k not in embedding}


def test_order():
    assert [stage.next for stage in Stage] == [Stage.PROXY, Stage.DISTILLATION, None]
    assert [stage.trains_flow for stage in Stage] == [True, False, True]
    assert [stage.trains_proxy for stage in Stage] == [False, True, False]


@pytest.mark.parametrize("shared", [False, True])
def test_only_the_models_of_a_stage_learn(shared):
    inference = make(shared, weights="fixed")  # the proxy is followed from the start
    states = record(inference)
    train(inference, 12)
    stages = inference.summary["stage"]
    assert stages == ["flow"] * 4 + ["proxy"] * 4 + ["distillation"] * 4
    assert bool(split(states[0][0][1])[0]) == shared
    assert any("running" in k or "mean" in k for k in split(states[0][0][1])[0]) == (
        shared
    )
    for stage, (before, after, _) in zip(stages, states, strict=True):
        parts = [(split(a), split(b)) for a, b in zip(before, after, strict=True)]
        own = [not equal(a[1], b[1]) for a, b in parts]
        assert own == [stage != "proxy", stage == "proxy"]
        if shared:
            # With its running means: an embedding of both is the flow's to learn, but
            # not while a proxy that stands still rests on it.
            embedding = [not equal(a[0], b[0]) for a, b in parts]
            assert embedding == [stage == "flow"] * 2
    # A stage begins with the best that the one before has found.
    losses = inference.summary["validation_loss"]
    best = losses.index(min(losses[:4]))
    assert equal(states[4][0][0], states[best][1][0])
    losses = inference.summary["validation_proxy_forward_kl"][4:8]
    best = 4 + losses.index(min(losses))
    assert equal(states[8][0][1], states[best][1][1])
    assert equal(states[8][0][0], states[4][0][0])
    assert inference.summary["validation_loss"][4:8] == pytest.approx(
        [min(inference.summary["validation_loss"][:4])] * 4
    )


def test_what_is_drawn_serves_as_long_as_it_holds(monkeypatch):
    monkeypatch.setattr(trainer, "DISTILLATION_EPOCHS", 2)
    inference = make(weights="fixed")
    states, samples = record(inference), []
    validate_epoch = inference._validate_epoch

    def recording_validation(*args):
        loss = validate_epoch(*args)
        samples.append(inference._proxy_samples.get("validation"))
        return loss

    inference._validate_epoch = recording_validation
    train(inference, 12)
    proposals, of_proxy = (
        [drawn[name] for _, _, drawn in states]
        for name in ("proposals", "proxy samples")
    )
    # Of a flow that stands still, once.
    assert proposals[:4] == [None] * 4
    assert len({id(drawn) for drawn in proposals[4:8]}) == 1
    assert proposals[4] is not None
    # They serve as proposals of the proxy's samples, too, and are given up then.
    assert proposals[8:] == [None] * 4
    assert of_proxy[:8] == [None] * 8
    pool = {tuple(theta) for theta in proposals[4].theta.flatten(0, 1).tolist()}
    assert all(
        tuple(theta) in pool for theta in of_proxy[8].theta.flatten(0, 1).tolist()
    )
    # Of a proxy that stands still, again as the flow that proposes them moves on.
    assert of_proxy[8] is of_proxy[9]
    assert of_proxy[10] is of_proxy[11]
    assert not torch.equal(of_proxy[9].theta, of_proxy[10].theta)
    assert of_proxy[9].theta.shape == of_proxy[10].theta.shape == (16, 135, 2)
    # Those that epochs are compared on stay.
    assert samples[:8] == [None] * 8
    assert len({id(each) for each in samples[8:]}) == 1
    assert samples[8].theta.shape == (16, 15, 2)


def test_weights_change_in_the_last_stage_only():
    inference = make()
    train(inference, 12)
    summary = inference.summary
    names = ("dual_forward_kl", "dual_reverse_kl", "dual_proxy_forward_kl")
    for name in names:
        assert summary[name][:8] == [1.0] * 8
    # A constraint that is met leaves its variable where it is.
    for epoch in range(8, 12):
        assert any(summary[name][epoch] != 1.0 for name in names)


def test_trust_is_measured_with_the_best_proxy():
    class Recording(AdaptiveWeights):
        def __init__(self):
            super().__init__()
            self.measured, self.updated = [], []

        def measure_trust(self, validation):
            super().measure_trust(validation)
            self.measured.append(self.trust)

        def update(self, validation):
            super().update(validation)
            self.updated.append(self.trust)

    # Steps so wide that a proxy is not better than that of the epoch before, always.
    inference = make(weights=Recording())
    train(inference, 30, learning_rate=5e-2, stop_after_epochs=100)
    summary, weights = inference.summary, inference.weights
    assert summary["stage"] == ["flow"] * 10 + ["proxy"] * 10 + ["distillation"] * 10
    assert summary["trust"][:10] == [0.0] * 10
    losses = summary["validation_proxy_forward_kl"][10:20]
    best = [loss == min(losses[: i + 1]) for i, loss in enumerate(losses)]
    assert 2 <= sum(best) < 10
    assert len(weights.measured) == sum(best)
    # Of the best proxy, until there is a better one.
    measured = iter(weights.measured)
    expected = [0.0]
    for is_best in best:
        expected.append(next(measured) if is_best else expected[-1])
    assert summary["trust"][10:20] == expected[1:]
    assert len(set(weights.measured)) == len(weights.measured)
    # The flow catches up: trust moves on by averages.
    assert summary["trust"][20:] == weights.updated
    assert len(weights.updated) == 10


@pytest.mark.parametrize("shared", [False, True])
def test_the_flow_is_chosen_by_both_its_losses_when_it_follows(shared):
    class Devoted(FixedWeights):
        """The flow is asked for the distance to the proxy more than for all else."""

        @property
        def flow_share(self):
            return 3.0

    inference = make(shared, weights=Devoted())
    states, distances = record(inference), []
    validation = inference._flow_validation

    def recording_validation(*args):
        result = validation(*args)
        distances.append(result[1].mean().item())
        return result

    inference._flow_validation = recording_validation
    estimator = train(inference, 30, learning_rate=3e-2, stop_after_epochs=100)
    losses = inference.summary["validation_loss"]
    assert inference.summary["stage"][20:] == ["distillation"] * 10
    assert len(distances) == 10  # fifteen simulations for validation: one batch
    scores = [
        loss + 3 * distance
        for loss, distance in zip(losses[20:], distances, strict=True)
    ]
    best = 20 + scores.index(min(scores))
    assert equal(state_of(estimator.flow), states[best][1][0])
    assert inference._best["flow"][0] == pytest.approx(min(scores), rel=1e-6)
    # The one by forward divergence alone would be another.
    assert best != 20 + losses[20:].index(min(losses[20:]))
    # What is told of it is its validation loss.
    assert inference.summary["best_validation_loss"] == [losses[best]]
    assert inference._best_val_loss == losses[best]
    index = inference.val_indices
    theta, x, _ = inference.get_simulations()
    with torch.no_grad():
        loss = estimator.loss(theta[index], x[index]).mean().item()
    assert loss == pytest.approx(losses[best], abs=1e-5)


def test_flow_and_proxy_of_the_last_stage_come_nearer():
    distances = {}
    for weights in ((1, 1e-9, 1), (1, 1, 1)):
        inference = make(weights=FixedWeights(weights))
        train(inference, 60, learning_rate=5e-3, stop_after_epochs=100)
        reverse = values_of(inference.summary, "validation_reverse_kl")[-10:]
        distances[weights[1]] = sum(reverse) / 10
    assert 0 < distances[1] < 0.7 * distances[1e-9]


def test_without_weight_on_the_proxy_training_ends_with_the_flow():
    inference = make(weights=FixedWeights((1, 0, 0)))
    states = record(inference)
    train(inference, 300, stop_after_epochs=3, learning_rate=5e-2)
    stages, losses = (inference.summary[name] for name in ("stage", "validation_loss"))
    assert set(stages) == {"flow"}
    assert 4 < len(stages) < 100
    assert losses.index(min(losses)) == len(losses) - 4
    assert equal(states[0][0][1], states[-1][1][1])
    for name in ("validation_proxy_forward_kl", "log_partition"):
        assert all(map(math.isnan, inference.summary[name]))
    # What there is of a proxy is the base measure, and the posterior the flow's.
    posterior = inference.build_posterior(sample_with="refined")
    assert posterior.sample((5,), x=torch.zeros(1, 2)).isfinite().all()
    # Where the stages are cut by the number of epochs, this one goes on.
    inference = make(weights=FixedWeights((1, 0, 0)))
    train(inference, 12, stop_after_epochs=100)
    assert inference.summary["stage"] == ["flow"] * 12


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_epochs", [2, 6, 8, 10])
def test_a_training_that_ends_early_has_the_best_of_its_stage(shared, num_epochs):
    inference = make(shared)
    states = record(inference)
    interrupt_before(inference, num_epochs)
    estimator = train(inference, 12)
    assert len(inference.summary["stage"]) == num_epochs
    losses = inference.summary["validation_loss"][:4]
    best = losses.index(min(losses))
    if num_epochs == 10:
        epoch = inference._best["flow"][1]
        assert epoch in (8, 9)
        best = epoch
    assert equal(state_of(estimator.flow), states[best][1][0])
    if num_epochs > 4:
        losses = inference.summary["validation_proxy_forward_kl"][4:8]
        best = 4 + losses.index(min(losses))
        assert equal(state_of(estimator.proxy), states[best][1][1])


def test_a_proxy_keeps_the_embedding_that_it_has_learnt_with():
    # Whatever the flow does when it follows.
    inference = make(shared=True)
    states = record(inference)
    num_steps = [0]
    step = inference._step

    def harmful(clip_max_norm):
        num_steps[0] += 1
        step(clip_max_norm)
        if inference._stage is Stage.DISTILLATION:
            embedding = {
                id(p) for p in inference._neural_net.flow.embedding_net.parameters()
            }
            with torch.no_grad():
                for parameter in inference._neural_net.flow.parameters():
                    if id(parameter) not in embedding:
                        parameter += 0.5 * torch.randn_like(parameter)

    inference._step = harmful
    estimator = train(inference, 12)
    losses = inference.summary["validation_loss"]
    assert min(losses[8:]) > max(losses[4:8])  # of the flow at rest
    losses = inference.summary["validation_proxy_forward_kl"]
    kept = states[4 + losses[4:8].index(min(losses[4:8]))][1]
    assert equal(state_of(estimator.proxy), kept[1])
    assert equal(split(state_of(estimator.flow))[0], split(kept[0])[0])
    # Standing still, it is the same proxy at every epoch, but for the noise of log Z.
    assert losses[8:] == pytest.approx([losses[8]] * 4, abs=1e-5)
    assert num_steps[0] == 36


@pytest.mark.parametrize("scratch", [False, True])
def test_a_later_round_has_the_same_stages(scratch):
    inference = make()
    train(inference, 6)
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    theta = proposal.sample((60,), show_progress_bars=False)
    inference.append_simulations(theta, theta + torch.randn(60, 2), proposal=proposal)
    states = record(inference)
    before = state_of(inference._neural_net.proxy)
    train(inference, 6, retrain_from_scratch=scratch)
    assert (
        inference.summary["stage"]
        == (["flow"] * 2 + ["proxy"] * 2 + ["distillation"] * 2) * 2
    )
    # Unless from scratch, the proxy waits as the last round has left it.
    assert equal(states[2][0][1], before) == (not scratch)
    assert_epochs_are_finite(inference.summary)


@pytest.mark.parametrize("num_epochs", [2, 6, 12])
def test_plots_and_progress_of_every_stage(num_epochs, capsys, recwarn):
    inference = make()
    inference._show_progress_bars = True
    if num_epochs < 12:
        interrupt_before(inference, num_epochs)
    train(inference, 12)
    assert ("nan" in capsys.readouterr().out) is False
    figure, axes = plot_training(inference.summary)
    figure.canvas.draw()
    assert all(math.isfinite(limit) for ax in axes for limit in ax.get_ylim())
    said = [str(warning.message) for warning in recwarn]
    expected = ("interrupted", "Maximum number of epochs")
    assert not [text for text in said if not any(part in text for part in expected)]
    assert len(values_of(inference.summary, "log_partition")) == max(num_epochs - 4, 0)
