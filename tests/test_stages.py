"""The stages of training: who learns when, from what, and where it ends."""

import math
from typing import Any, Dict

import pytest
import torch
from helpers import (
    StatefulEmbedding,
    identical,
    interrupt_before,
    state_of,
    values_of,
)
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform

from sbi_jeffreys import FixedWeights, JeffreysNPE, NoTracker, energy_nn
from sbi_jeffreys.plots import plot_training
from sbi_jeffreys.stages import Stage

pytestmark = pytest.mark.filterwarnings(
    "ignore:Maximum number of epochs", "ignore:Training was interrupted"
)

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
    """Record both models before the first and after every epoch, and what was drawn."""
    states = []
    train_epoch = inference._train_epoch

    def both():
        estimator = inference._neural_net
        return state_of(estimator.flow), state_of(estimator.proxy)

    def recording_train(*args):
        before = both()
        loss = train_epoch(*args)
        states.append((before, both(), inference._proposals.get("training")))
        return loss

    inference._train_epoch = recording_train
    return states


def test_order():
    assert [stage.next for stage in Stage] == [Stage.PROXY, Stage.JOINT, Stage.JOINT]
    assert [stage.trains_flow for stage in Stage] == [True, False, True]
    assert [stage.trains_proxy for stage in Stage] == [False, True, True]


@pytest.mark.parametrize("shared", [False, True])
def test_only_the_models_of_a_stage_learn(shared):
    inference = make(shared)
    states = record(inference)
    train(inference, 12)
    stages = inference.summary["stage"]
    assert stages == ["flow"] * 4 + ["proxy"] * 4 + ["joint"] * 4
    embedding = {name for name in states[0][0][1] if shared and "embedding_net" in name}
    assert bool(embedding) == shared
    for stage, (before, after, _) in zip(stages, states, strict=True):
        moved = [not equal(*pair) for pair in zip(before, after, strict=True)]
        if stage == "flow" and shared:
            # The embedding of both learns; the proxy's own part does not.
            own = [
                {name: v for name, v in state.items() if name not in embedding}
                for state in (before[1], after[1])
            ]
            assert moved[0]
            assert equal(*own)
        else:
            assert moved == [stage != "proxy", stage != "flow"]
    # A stage begins with the best that the one before has found.
    losses = inference.summary["validation_loss"]
    best = losses.index(min(losses[:4]))
    assert equal(states[4][0][0], states[best][1][0])
    losses = inference.summary["validation_proxy_forward_kl"][4:8]
    best = 4 + losses.index(min(losses))
    assert equal(states[8][0][1], states[best][1][1])
    # While the flow stands still, what was drawn from it serves.
    assert all(state[2] is None for state in states[:4])
    assert len({id(state[2]) for state in states[4:8]}) == 1
    assert states[8][2] is not states[7][2]
    assert inference.summary["validation_loss"][4:8] == pytest.approx(
        [min(inference.summary["validation_loss"][:4])] * 4
    )


def test_weights_change_in_the_joint_stage_only():
    inference = make()
    train(inference, 12)
    duals = inference.summary["dual_reverse_kl"]
    assert duals[:8] == [1.0] * 8
    assert all(dual != 1.0 for dual in duals[8:])
    assert inference.summary["trust"][:8] == inference.summary["trust"][:1] * 8


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
@pytest.mark.parametrize("num_epochs", [2, 6])
def test_a_training_that_ends_early_has_the_best_of_its_stage(shared, num_epochs):
    inference = make(shared)
    states = record(inference)
    interrupt_before(inference, num_epochs)
    estimator = train(inference, 12)
    losses = inference.summary["validation_loss"][:4]
    best = losses.index(min(losses))
    assert equal(state_of(estimator.flow), states[best][1][0])
    if num_epochs == 6:
        losses = inference.summary["validation_proxy_forward_kl"][4:]
        best = 4 + losses.index(min(losses))
        assert equal(state_of(estimator.proxy), states[best][1][1])


def test_a_proxy_that_shares_its_embedding_is_kept_from_its_own_stage():
    # A flow that is at its best before the joint stage needs a proxy all the same.
    inference = make(shared=True)
    states = record(inference)
    num_steps = [0]
    step = inference._step

    def harmful(clip_max_norm):
        num_steps[0] += 1
        step(clip_max_norm)
        if inference._stage is Stage.JOINT:
            with torch.no_grad():
                for parameter in inference._neural_net.flow.parameters():
                    parameter += 0.5 * torch.randn_like(parameter)

    inference._step = harmful
    estimator = train(inference, 12)
    losses = inference.summary["validation_loss"]
    assert min(losses[8:]) > max(losses[4:8])  # of the flow at rest
    losses = inference.summary["validation_proxy_forward_kl"][4:8]
    kept = states[4 + losses.index(min(losses))][1]
    assert equal(state_of(estimator.flow), kept[0])
    assert equal(state_of(estimator.proxy), kept[1])
    assert num_steps[0] == 36


def test_a_later_round_trains_both_at_once():
    inference = make()
    train(inference, 6)
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    theta = proposal.sample((60,), show_progress_bars=False)
    inference.append_simulations(theta, theta + torch.randn(60, 2), proposal=proposal)
    train(inference, 3)
    assert inference.summary["stage"][6:] == ["joint"] * 3
    train(inference, 6, retrain_from_scratch=True)
    assert (
        inference.summary["stage"][9:] == ["flow"] * 2 + ["proxy"] * 2 + ["joint"] * 2
    )


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
