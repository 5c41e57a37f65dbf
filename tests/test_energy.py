"""The energy-based proxy: its builder, its density and its embedding."""

import copy
import math

import pytest
import torch
from helpers import grid, log_integral
from sbi.utils import BoxUniform
from torch import nn
from torch.distributions import MultivariateNormal

from sbi_jeffreys import ConditionalEnergy, energy_nn
from sbi_jeffreys.base_measure import LebesgueMeasure, PriorMeasure

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))


def simulations(num=300, scale=1.0, shift=0.0):
    theta = PRIOR.sample((num,))
    x = torch.cat((theta, theta[:, :1] ** 2), 1) + 0.3 * torch.randn(num, 3)
    return theta * scale + shift, x


def randomize(proxy, seed=1):
    """Give the last layer, which starts at zero, random weights."""
    torch.manual_seed(seed)
    nn.init.normal_(proxy.net.final_layer.weight)
    return proxy.eval()


def build(**kwargs):
    theta, x = simulations()
    return energy_nn(**{"hidden_features": 10, "num_blocks": 1, **kwargs})(
        theta, x, PRIOR
    )


def test_it_starts_as_its_base_measure():
    proxy = build()
    theta, x = simulations(7)
    points = torch.stack((theta, theta.roll(1, 0), 3 + theta))
    f = proxy(points, x)
    assert f.shape == (3, 7)
    assert (f == 0).all()
    log_q = proxy.log_prob(points, x, num_samples=50)
    expected = PRIOR.log_prob(points.reshape(-1, 2)).reshape(3, 7)
    torch.testing.assert_close(log_q, expected)
    assert torch.isneginf(log_q[2]).any()


def test_density_integrates_to_one():
    proxy = randomize(build(hidden_features=20))
    _, x = simulations(3)
    points, cell = grid(-2, 2, 150, 2)
    theta = points.float().unsqueeze(1).expand(-1, 3, -1)
    with torch.no_grad():
        log_z = proxy.log_partition(x, num_samples=20_000)
        log_q = proxy.log_unnormalized(theta, x) - log_z.debiased
        assert log_q.std(0).min() > 0.1  # not flat
        log_integrals = log_integral(log_q, cell)
    assert (log_integrals.abs() < 4 * log_z.standard_error + 1e-3).all()
    assert (log_z.standard_error < 0.05).all()


def test_every_pair_is_evaluated_at_its_own_condition():
    proxy = randomize(build())
    theta, x = simulations(5)
    together = proxy(theta.unsqueeze(1).expand(-1, 5, -1), x)
    for i in range(5):
        for j in range(5):
            alone = proxy(theta[i].reshape(1, 1, 2), x[j : j + 1])
            torch.testing.assert_close(together[i, j], alone[0, 0])
    assert (together[0].diff().abs() > 1e-4).all()


@pytest.mark.parametrize("name", ["prior", "lebesgue"])
def test_base_measure(name):
    proxy = build(base_measure=name)
    expected = PriorMeasure if name == "prior" else LebesgueMeasure
    assert type(proxy.base) is expected
    theta = torch.tensor([[[0.5, 0.5]], [[2.5, 0.0]]])
    log_b = -math.log(16) if name == "prior" else 0.0
    assert proxy.log_unnormalized(theta, torch.zeros(1, 3)).flatten().tolist() == [
        pytest.approx(log_b),
        -torch.inf,
    ]


def test_options_reach_the_network():
    def count(module, kind):
        return sum(isinstance(m, kind) for m in module.modules())

    calls = []

    def activation(h):
        calls.append(len(h))
        return torch.tanh(h)

    proxy = build(hidden_features=12, num_blocks=4, activation=activation, dropout=0.5)
    assert {
        m.in_features for m in proxy.net.blocks.modules() if hasattr(m, "bias")
    } == {12}
    assert len(proxy.net.blocks) == 4
    assert count(proxy, nn.Dropout) == 4
    theta, x = simulations(6)
    randomize(proxy)
    assert torch.equal(proxy(theta[None], x), proxy(theta[None], x))
    assert calls
    proxy.train()
    assert not torch.equal(proxy(theta[None], x), proxy(theta[None], x))


@pytest.mark.parametrize("option", ["independent", "structured"])
def test_z_scoring_makes_units_irrelevant(option):
    outputs = []
    for scale, shift in ((1.0, 0.0), (1000.0, 5.0)):
        torch.manual_seed(0)
        theta, x = simulations(100, scale, shift)
        torch.manual_seed(0)
        prior = BoxUniform(
            -2 * scale * torch.ones(2) + shift, 2 * scale * torch.ones(2) + shift
        )
        proxy = energy_nn(10, 1, z_score_theta=option, z_score_x=option)(
            theta, 7 + 100 * scale * x, prior
        )
        randomize(proxy)
        outputs.append(proxy(theta[None], 7 + 100 * scale * x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


def test_no_z_scoring():
    proxy = randomize(build(z_score_theta="none", z_score_x="none"))
    theta, x = simulations(4)
    features = proxy.net.theta_layer(theta[None]) + proxy.net.x_layer(x)
    for block in proxy.net.blocks:
        features = block(features)
    expected = proxy.net.final_layer(nn.functional.silu(features)).squeeze(-1)
    torch.testing.assert_close(proxy(theta[None], x), expected)


class CountingEmbedding(nn.Module):
    """Embeds images of shape (2, 4), and counts how many."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.count = 0

    def forward(self, x):
        assert x.shape[1:] == (2, 4)
        self.count += len(x)
        return self.linear(x.flatten(1))


def test_embedding_of_images_is_shared_and_computed_once():
    embedding = CountingEmbedding()
    theta, x = PRIOR.sample((50,)), torch.randn(50, 2, 4)
    proxy = energy_nn(10, 1, z_score_x="structured", embedding_net=embedding)(
        theta, x, PRIOR
    )
    assert embedding.linear.weight in set(proxy.parameters())
    randomize(proxy)
    embedding.count = 0
    assert proxy(theta[:6].expand(20, 6, 2), x[:6]).shape == (20, 6)
    assert embedding.count == 6  # not 120


def test_gradients_reach_energy_and_parameters():
    proxy = randomize(build())
    theta, x = simulations(5)
    points = theta[None].requires_grad_()
    f = proxy(points, x)
    (slope,) = torch.autograd.grad(f.sum(), points, create_graph=True)
    for i in range(2):
        step = torch.zeros(2)
        step[i] = 1e-2
        difference = (proxy(points + step, x) - proxy(points - step, x)) / 2e-2
        torch.testing.assert_close(slope[..., i], difference, rtol=0.02, atol=5e-3)


def test_one_parameter_and_one_feature():
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    theta = prior.sample((100,))
    proxy = energy_nn(10, 1)(theta, theta + torch.randn(100, 1), prior)
    assert proxy(theta[:4].unsqueeze(1), torch.zeros(1, 1)).shape == (4, 1)
    log_z = proxy.log_partition(torch.zeros(3, 1), num_samples=10)
    torch.testing.assert_close(log_z.value, torch.zeros(3))
    assert log_z.effective_sample_size.tolist() == [10, 10, 10]


def test_copies_and_states():
    proxy = randomize(build())
    theta, x = simulations(5)
    clone = copy.deepcopy(proxy)
    assert torch.equal(clone(theta[None], x), proxy(theta[None], x))
    other = build()
    assert not torch.equal(other(theta[None], x), proxy(theta[None], x))
    other.load_state_dict(proxy.state_dict())
    assert torch.equal(other(theta[None], x), proxy(theta[None], x))
    assert isinstance(clone.to("cpu"), ConditionalEnergy)
    assert clone.base.scale.device.type == "cpu"


def test_two_proxies_of_a_builder_share_nothing():
    builder = energy_nn(10, 1)
    theta, x = simulations()
    one, two = builder(theta, x, PRIOR), builder(theta, x, PRIOR)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"base_measure": "uniform"}, "'prior' or 'lebesgue', got 'uniform'"),
        ({"z_score_theta": "yes"}, "yes"),
        ({"z_score_x": "all"}, "all"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        energy_nn(**kwargs)(*simulations(), PRIOR)
