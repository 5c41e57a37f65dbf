"""Training on a GPU, data on the CPU, and estimators that move between them."""

import copy

import pytest
import torch
from helpers import assert_epochs_are_finite
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform, MultipleIndependent
from torch.distributions import Gamma, MultivariateNormal, Uniform

from sbi_jeffreys import (
    JeffreysEstimator,
    JeffreysNPE,
    NoTracker,
    check_fit,
    compare_models,
    energy_nn,
    proxy_based_potential,
    trainer,
)
from sbi_jeffreys.pooled_energy import PooledEnergy
from sbi_jeffreys.stages import Stage

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs")

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="there is no GPU on this machine"
        ),
    ],
)


@pytest.mark.parametrize("device", ["mps", "mps:0", torch.device("mps"), "gpu"])
def test_a_device_without_double_precision_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match="no double precision.*device='cpu'"):
            JeffreysNPE(device=device, tracker=NoTracker())
        assert torch.get_default_dtype() == torch.float64  # as sbi would not leave it
    finally:
        torch.set_default_dtype(before)


def make_prior(kind, device):
    if kind == "box":
        low = -2 * torch.ones(2, device=device)
        return BoxUniform(low, -low, device=device)
    if kind == "normal":
        return MultivariateNormal(
            torch.zeros(2, device=device), torch.eye(2, device=device)
        )
    if kind == "independent":
        one = torch.ones(1, device=device)
        return MultipleIndependent(
            [Uniform(0 * one, one), Gamma(2 * one, one)], device=device
        )
    return None


def train(device, kind="box", data_device=None, **kwargs):
    torch.manual_seed(0)
    inference = JeffreysNPE(
        make_prior(kind, device),
        posterior_nn("maf", hidden_features=10, num_transforms=2),
        device=device,
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(10, 1, likelihood="auto"),
    )
    source = make_prior("box" if kind is None else kind, "cpu")
    theta = source.sample((300,))
    x = theta + 0.5 * torch.randn(300, 2)
    inference.append_simulations(theta, x, data_device=data_device)
    inference.train(**{"max_num_epochs": 3, **kwargs})
    return inference


def devices_of(estimator):
    base = estimator.proxy.base
    tensors = [*estimator.parameters(), *estimator.buffers(), base.scale, base.center]
    tensors.append(base.reference.sample((1,)))
    return {tensor.device.type for tensor in tensors}


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("data_device", [None, "cpu"])
@pytest.mark.parametrize("kind", ["box", "normal", "independent", None])
@pytest.mark.filterwarnings("ignore:No prior was given")
def test_training(device, data_device, kind):
    inference = train(device, kind, data_device)
    assert devices_of(inference._neural_net) == {device}
    assert inference.summary["stage"] == [stage.value for stage in Stage]
    assert isinstance(inference._neural_net.proxy, PooledEnergy)
    assert_epochs_are_finite(inference.summary)
    for sample_with in ("direct", "refined"):
        posterior = inference.build_posterior(sample_with=sample_with)
        # Ours takes observations that lie on the CPU, as simulators leave them; sbi's
        # does not.
        x_o = torch.full((1, 2), 0.5)
        x_o = x_o.to(device) if sample_with == "direct" else x_o
        samples = posterior.sample((20,), x=x_o, show_progress_bars=False)
        assert samples.device.type == device
        log_prob = posterior.log_prob(samples, x=x_o.to(device))
        assert log_prob.device.type == device
        assert log_prob.isfinite().all()
        batched = posterior.sample_batched(
            (5,), x_o.expand(3, 2).to(device), show_progress_bars=False
        )
        assert batched.shape == (5, 3, 2)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_two_rounds_and_resuming(device):
    inference = train(device)
    inference.train(resume_training=True, max_num_epochs=5)
    proposal = inference.build_posterior(sample_with="refined")
    proposal.set_default_x(torch.zeros(1, 2))
    theta = proposal.sample((200,))
    x = theta + 0.5 * torch.randn_like(theta)
    inference.append_simulations(theta, x, proposal=proposal)
    inference.train(max_num_epochs=3, training_batch_size=50)
    assert devices_of(inference._neural_net) == {device}


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_fit_can_be_checked(device):
    inference = train(device)
    comparison = compare_models(inference)
    assert comparison.disagreement.device.type == "cpu"
    assert str(comparison)
    check = check_fit(inference, torch.full((2,), 30.0).to(device), comparison)
    assert not check.trusted


@pytest.mark.parametrize("trained_on", ["cpu", GPU])
@pytest.mark.parametrize("moved_to", ["cpu", GPU])
@pytest.mark.parametrize("sample_with", ["direct", "refined"])
def test_posteriors_move(trained_on, moved_to, sample_with):
    inference = train(trained_on)
    x_o = torch.full((1, 2), 0.5)
    posterior = inference.build_posterior(sample_with=sample_with)
    posterior.set_default_x(x_o.to(trained_on))
    theta = torch.tensor([[0.3, -0.4], [1.0, 1.0]])
    expected = posterior.potential(theta.to(trained_on)).cpu()
    moved = copy.deepcopy(posterior)
    moved.to(moved_to)
    assert devices_of(moved.posterior_estimator) == {moved_to}
    assert moved.default_x.device.type == moved_to
    got = moved.potential(theta.to(moved_to))
    assert got.device.type == moved_to
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert moved.sample((5,), show_progress_bars=False).device.type == moved_to
    assert moved.log_prob(theta.to(moved_to)).device.type == moved_to
    # The first stays where it was, with its prior.
    assert devices_of(posterior.posterior_estimator) == {trained_on}
    assert posterior.prior.sample((1,)).device.type == trained_on


@pytest.mark.parametrize("trained_on", ["cpu", GPU])
@pytest.mark.parametrize("moved_to", ["cpu", GPU])
def test_the_estimator_moves_with_its_proxy(trained_on, moved_to):
    estimator = copy.deepcopy(train(trained_on)._neural_net)
    theta = torch.tensor([[[0.3, -0.4]], [[3.0, 0.0]]])
    x = torch.full((1, 2), 0.5)
    with torch.no_grad():
        expected = estimator.proxy.log_unnormalized(
            theta.to(trained_on), x.to(trained_on)
        ).cpu()
        estimator.to(moved_to)
        assert devices_of(estimator) == {moved_to}
        got = estimator.proxy.log_unnormalized(theta.to(moved_to), x.to(moved_to))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)
    potential, _ = proxy_based_potential(
        estimator, make_prior("box", moved_to), x.to(moved_to)
    )
    value = potential(theta[0].to(moved_to))
    torch.testing.assert_close(value.detach().cpu(), expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["meta"])
def test_what_moves_is_moved_by_the_estimator(device):
    """Without a GPU: a device that holds no data still shows what was left behind."""
    proxy = train("cpu", "normal")._neural_net.proxy
    base = copy.deepcopy(proxy.base)
    base.to(device)
    assert {base.scale.device.type, base.center.device.type} == {device}
    assert base.reference.loc.device.type == device
    assert proxy.base.scale.device.type == "cpu"


def test_averages_are_made_of_weights_that_have_been_moved(monkeypatch):
    """Without a GPU: sbi moves the network only when its loop begins."""
    events = []

    class Average(trainer.WeightAverage):
        def __init__(self, *args):
            events.append("average")
            super().__init__(*args)

    def to(self, device):
        events.append(device)
        return move(self, device)

    move = JeffreysEstimator.to
    monkeypatch.setattr(trainer, "WeightAverage", Average)
    monkeypatch.setattr(JeffreysEstimator, "to", to)
    train("cpu", max_num_epochs=1)
    assert events[:2] == ["cpu", "average"]
