"""The moving average of weights: its value, its place in training, its return."""

import copy

import pytest
import torch
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn, trainer
from sbi_jeffreys.averaging import WeightAverage

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))


def weights_of(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first, second):
    pairs = zip(first["averages"], second["averages"], strict=True)
    return first["count"] == second["count"] and all(torch.equal(*p) for p in pairs)


def move(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
            parameter.add_(parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float, torch.cfloat])
def test_value_is_that_of_the_closed_form(dtype):
    # Embedding nets may have complex parameters beside real ones.
    module = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3, dtype=dtype)])
    average = WeightAverage(module, num_steps=3)
    values = [weights_of(module)]
    for _ in range(19):
        move(module)
        average.update()
        values.append(weights_of(module))
    # Of the first four steps it is the weights; then it is over t / 4 steps, and over
    # three of them from the twelfth on.
    gammas = [0.0] * 4 + [1 - 4 / t for t in range(5, 12)] + [2 / 3] * 8
    factors = [1.0]
    for gamma in gammas:
        factors = [gamma * factor for factor in factors] + [1 - gamma]
    assert sum(factors) == pytest.approx(1.0)
    for index, got in enumerate(average.state()["averages"]):
        wanted = sum(f * value[index] for f, value in zip(factors, values, strict=True))
        torch.testing.assert_close(got, wanted)


def test_value_is_that_of_torch():
    module = nn.Sequential(nn.Linear(2, 5), nn.PReLU(), nn.Linear(5, 1))
    average = WeightAverage(module, num_steps=7)
    for _ in range(28):
        move(module)
        average.update()
    averaged = AveragedModel(module, avg_fn=get_ema_avg_fn(1 - 1 / 7))
    averaged.update_parameters(module)  # the first one is a copy
    with torch.no_grad():
        for parameter, value in zip(
            averaged.parameters(), average.state()["averages"], strict=True
        ):
            parameter.copy_(value)
    for _ in range(5):
        move(module)
        average.update()
        averaged.update_parameters(module)
    for got, wanted in zip(
        average.state()["averages"], averaged.parameters(), strict=True
    ):
        torch.testing.assert_close(got, wanted.detach())


def test_of_one_step_it_is_the_weights():
    module = nn.Linear(2, 2)
    average = WeightAverage(module, num_steps=1)
    move(module)
    average.update()
    for got, wanted in zip(
        average.state()["averages"], weights_of(module), strict=True
    ):
        assert torch.equal(got, wanted)


def test_applied_for_a_while_and_taken_back():
    module = nn.Linear(2, 2)
    average = WeightAverage(module, num_steps=3)
    move(module)
    average.update()
    weights, averages, optimizer = (
        weights_of(module),
        average.state()["averages"],
        torch.optim.Adam(module.parameters()),
    )
    with pytest.raises(KeyboardInterrupt), average.applied():
        for parameter, wanted in zip(module.parameters(), averages, strict=True):
            assert torch.equal(parameter, wanted)
        raise KeyboardInterrupt
    for parameter, wanted in zip(module.parameters(), weights, strict=True):
        assert torch.equal(parameter, wanted)
    # Still the parameters that the optimiser knows, and not those of the average.
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight, weights[0])
    for got, wanted in zip(average.state()["averages"], averages, strict=True):
        assert torch.equal(got, wanted)


def test_state_is_a_copy_in_both_directions():
    module = nn.Linear(2, 2)
    average = WeightAverage(module, num_steps=3)
    state = average.state()
    before = copy.deepcopy(state)
    move(module)
    average.update()
    assert same(state, before)
    average.load_state(state)
    average.update()
    assert same(state, before)
    average.restart(num_steps=3)
    for got, wanted in zip(
        average.state()["averages"], weights_of(module), strict=True
    ):
        assert torch.equal(got, wanted)


def test_restarted_it_reaches_back_as_far_as_it_is_told():
    module = nn.Linear(2, 2)
    average = WeightAverage(module, num_steps=50)
    state = average.state()
    average.restart(num_steps=1)
    for _ in range(20):
        move(module)
        average.update()
    for got, wanted in zip(
        average.state()["averages"], weights_of(module), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    average.load_state(state)
    for _ in range(20):
        move(module)
        average.update()
    averages = average.state()["averages"]
    assert not torch.allclose(averages[0], weights_of(module)[0], atol=1e-3)


def simulate(num):
    torch.manual_seed(3)
    theta = PRIOR.sample((num,))
    return theta, theta + 0.5 * torch.randn(num, 2)


def train(num_epochs, likelihood="auto", **kwargs):
    torch.manual_seed(1)
    inference = JeffreysNPE(
        PRIOR,
        posterior_nn("maf", hidden_features=8, num_transforms=2),
        energy_estimator=energy_nn(8, 1, likelihood=likelihood),
        tracker=NoTracker(),
        show_progress_bars=False,
    )
    inference.append_simulations(*simulate(150))
    trained = []
    step = inference._step

    def recording_step(*args):
        taken = step(*args)
        estimator = inference._neural_net
        trained.append([weights_of(estimator.flow), weights_of(estimator.proxy)])
        return taken

    inference._step = recording_step
    inference.train(
        max_num_epochs=num_epochs - 1,
        training_batch_size=45,
        learning_rate=1e-2,
        stop_after_epochs=100,
        **kwargs,
    )
    return inference, trained


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_training_keeps_the_average_of_the_best_epoch(monkeypatch):
    monkeypatch.setattr(trainer, "NUM_AVERAGED_EPOCHS", 2)
    # Of the network alone, which has the lowest loss in its own stage.
    inference, trained = train(12, likelihood="none")
    assert inference.summary["stage"] == (
        ["flow"] * 4 + ["proxy"] * 4 + ["distillation"] * 4
    )
    num_batches = len(trained) // 12
    _, epoch, state, loss = inference._best["proxy"]
    assert 4 <= epoch < 8
    # Averaged from the stage's start: before its first step the proxy had not moved.
    expected = trained[4 * num_batches - 1][1]
    for step in range(4 * num_batches, (epoch + 1) * num_batches):
        count = step + 1 - 4 * num_batches
        gamma = 1 - 1 / min(2 * num_batches, max(1, count / 4))
        expected = [
            gamma * average + (1 - gamma) * weights
            for average, weights in zip(expected, trained[step][1], strict=True)
        ]
    proxy = inference._neural_net.proxy
    for got, wanted in zip(weights_of(proxy), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    # And it is the average whose loss is told, with samples that did not choose it.
    losses = inference.summary["validation_proxy_forward_kl"][4:8]
    assert losses[epoch - 4] == min(losses)
    assert loss != min(losses)
    theta, x = simulate(150)
    index = inference.val_indices
    with torch.no_grad():
        log_z = proxy.log_partition(x[index], inference._neural_net.flow, 5000)
        log_q = proxy.log_unnormalized(theta[index][None], x[index])[0]
    # Of 256 weights at 15 conditions; the flow that proposes them is another by now.
    assert (log_z.value - log_q).mean().item() == pytest.approx(loss, abs=0.05)


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_likelihoods_are_the_averages_of_their_best_epochs(monkeypatch):
    monkeypatch.setattr(trainer, "NUM_AVERAGED_EPOCHS", 2)
    inference, trained = train(16)
    assert inference.summary["stage"][4:8] == ["likelihood"] * 4
    num_batches = len(trained) // 16
    start = 4 * num_batches
    proxy = inference._neural_net.proxy
    names = [name for name, _ in proxy.named_parameters()]
    # Averaged from the stage's start: before, the surrogates had not moved.
    averages, averages_of_epochs = trained[start - 1][1], []
    for step in range(start, 8 * num_batches):
        gamma = 1 - 1 / min(2 * num_batches, max(1, (step + 1 - start) / 4))
        averages = [
            gamma * average + (1 - gamma) * weights
            for average, weights in zip(averages, trained[step][1], strict=True)
        ]
        if (step + 1) % num_batches == 0:
            averages_of_epochs.append(dict(zip(names, averages, strict=True)))
    for k, member in enumerate(proxy.likelihoods.members):
        expected = averages_of_epochs[inference._best[f"likelihood {k}"][1] - 4]
        for name, got in member.named_parameters():
            wanted = expected[f"likelihoods.members.{k}.{name}"]
            torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_the_flow_of_the_next_stage_begins_with_the_average(monkeypatch):
    monkeypatch.setattr(trainer, "NUM_AVERAGED_EPOCHS", 2)
    inference, trained = train(16)
    num_batches = len(trained) // 16
    # While the proxy learns, the flow stands still at the best average of its epochs,
    # which none of its steps has had.
    resting = trained[4 * num_batches][0]
    for flow, _ in trained[: 4 * num_batches]:
        assert not all(torch.equal(a, b) for a, b in zip(flow, resting, strict=True))
    theta, x = simulate(150)
    index, losses = inference.val_indices, inference.summary["validation_loss"]
    flow = inference._neural_net.flow
    with torch.no_grad():
        for parameter, value in zip(flow.parameters(), resting, strict=True):
            parameter.copy_(value)
        loss = flow.loss(theta[index], x[index]).mean().item()
    assert loss == pytest.approx(min(losses[:4]), abs=1e-5)
