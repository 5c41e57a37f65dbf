"""The energy-based proxy: its builder, its density and its embedding."""

import copy
import math

import pytest
import torch
from helpers import grid, log_integral
from sbi.utils import BoxUniform
from torch import nn
from torch.distributions import Independent, Laplace, MultivariateNormal

from sbi_jeffreys import ConditionalEnergy, energy_nn
from sbi_jeffreys.base_measure import LebesgueMeasure, PriorMeasure
from sbi_jeffreys.energy import ConditionDropout
from sbi_jeffreys.features import Features

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

    dropouts = [m for m in build().modules() if isinstance(m, ConditionDropout)]
    assert {dropout.probability for dropout in dropouts} == {0.1}
    proxy = build(hidden_features=12, num_blocks=4, activation=activation, dropout=0.5)
    assert {
        m.in_features for m in proxy.net.blocks.modules() if hasattr(m, "bias")
    } == {12}
    assert len(proxy.net.blocks) == 4
    assert count(proxy, ConditionDropout) == 4
    assert (
        count(proxy.net, nn.Dropout) == 0
    )  # of nflows' blocks, a mask for every sample
    theta, x = simulations(6)
    randomize(proxy)
    assert torch.equal(proxy(theta[None], x), proxy(theta[None], x))
    assert calls
    proxy.train()
    assert not torch.equal(proxy(theta[None], x), proxy(theta[None], x))


def test_dropout_has_one_mask_for_all_samples_of_a_condition():
    dropout = ConditionDropout(0.3)
    hidden = torch.randn(7, 400, 50)
    dropped = dropout(hidden)
    mask = dropped / hidden
    assert set(mask.mul(0.7).round(decimals=4).unique().tolist()) == {0.0, 1.0}
    # All samples of a condition, as one energy at that condition.
    torch.testing.assert_close(mask, mask[:1].expand_as(mask))
    # But each condition has its own, of units that are left out independently.
    kept = (mask[0] > 0).double()
    assert len(kept.unique(dim=0)) == 400
    error = math.sqrt(0.3 * 0.7 / 400)
    assert ((kept.mean(0) - 0.7).abs() < 4 * error).all()
    assert abs(kept.mean().item() - 0.7) < 4 * error / math.sqrt(50)
    correlation = torch.corrcoef(kept.T) - torch.eye(50)
    assert correlation.abs().max() < 5 / math.sqrt(400)
    # And other ones the next time.
    assert not torch.equal(dropout(hidden), dropped)
    assert torch.equal(dropout.eval()(hidden), hidden)


def test_dropout_preserves_the_mean():
    dropout = ConditionDropout(0.3)
    hidden = torch.tensor([[[1.0, -2.0, 5.0]], [[0.5, 3.0, 0.0]]])
    dropped = torch.stack([dropout(hidden) for _ in range(4000)])
    # A unit is h / 0.7 with probability 0.7, and 0 else.
    error = hidden.abs() * math.sqrt(0.3 / 0.7 / 4000)
    assert ((dropped.mean(0) - hidden).abs() <= 4 * error).all()
    nothing = ConditionDropout(0.0)
    assert torch.equal(nothing(hidden), hidden)


def test_samples_of_a_condition_are_compared_by_one_energy():
    proxy = randomize(build(hidden_features=20, dropout=0.5)).train()
    theta, x = simulations(6)
    points = torch.stack((theta, theta.roll(1, 0), theta))
    x[1] = x[0]
    points[:, 1] = points[:, 0]
    f = proxy(points, x)
    torch.testing.assert_close(f[0], f[2])
    assert not torch.equal(f[0], f[1])
    # The same outputs a second time are another condition of the batch.
    assert (f[0, 0] - f[0, 1]).abs() > 1e-3
    f = proxy.eval()(points, x)
    torch.testing.assert_close(f[:, 0], f[:, 1])


@pytest.mark.parametrize("option", ["features", "independent", "structured"])
def test_units_are_irrelevant(option):
    outputs = []
    for scale, shift in ((1.0, 0.0), (1000.0, 5.0)):
        torch.manual_seed(0)
        theta, x = simulations(100, scale, shift)
        torch.manual_seed(0)
        prior = BoxUniform(
            -2 * scale * torch.ones(2) + shift, 2 * scale * torch.ones(2) + shift
        )
        embedding = {}
        if option != "features":
            embedding = {"z_score_x": option, "embedding_net": nn.Linear(3, 4)}
        proxy = energy_nn(10, 1, **embedding)(theta, 7 + 100 * scale * x, prior)
        randomize(proxy)
        outputs.append(proxy(theta[None], 7 + 100 * scale * x))
    assert outputs[0].std() > 0.1
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("embedding", [nn.Identity(), nn.Linear(3, 4)])
def test_network_is_its_formula(embedding):
    theta, x = simulations()
    proxy = randomize(
        energy_nn(10, 2, z_score_x="none", embedding_net=embedding)(theta, x, PRIOR)
    )
    net = proxy.net
    # Without an embedding network the condition enters by its features.
    features = Features(x)(x[:4])
    embedded = embedding(x[:4]) if isinstance(embedding, nn.Linear) else features
    z = (theta[:4] - theta.mean(0)) / theta.std(0)
    prediction = features @ net.coordinates.weight.T + net.coordinates.bias
    u = torch.linalg.solve(net.coordinates.cholesky, (z - prediction).T).T
    inputs = 10 * torch.tanh(torch.cat((z, u), 1) / 10)
    hidden = inputs @ net.theta_layer.weight.T + net.theta_layer.bias
    hidden = hidden + embedded @ net.x_layer.weight.T
    for block in net.blocks:
        hidden = block(hidden)
    h = nn.functional.silu(hidden) @ net.final_layer.weight[0]
    expected = (2 * torch.sigmoid(h)).log()
    torch.testing.assert_close(
        proxy(theta[None, :4], x[:4])[0], expected, atol=1e-4, rtol=1e-4
    )


def test_energy_is_bounded_far_away():
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    theta = prior.sample((300,))
    x = theta + 0.3 * torch.randn(300, 2)
    proxy = randomize(energy_nn(20, 3)(theta, x, prior))
    # None along an axis, where one of the inputs would still be small.
    angles = 0.4 + math.pi / 4 * torch.arange(8)
    directions = torch.stack((angles.cos(), angles.sin()), 1).unsqueeze(1)
    with torch.no_grad():
        near, far, farther = (
            proxy(distance * directions.expand(-1, 3, -1), x[:3])
            for distance in (1.0, 1e3, 1e6)
        )
    torch.testing.assert_close(far, farther, atol=1e-3, rtol=0)
    assert (far - near).abs().median() > 0.1  # not flat


def test_no_energy_of_a_posterior_is_much_lower_than_at_first():
    """Or nearly all of the mass could be where no sample has been."""
    theta, x = simulations(200)
    proxy = randomize(build())
    with torch.no_grad():
        proxy.net.final_layer.weight *= 1000
        f = proxy(theta[None], x)
    assert f.max() <= math.log(2) + 1e-6
    assert f.min() < -100
    # Nor is there a bound where there is no condition: it only slows the network down.
    # What is missing is no second value, neither here nor when a file is loaded.
    nothing, missing = torch.zeros(2, 200, 1)
    missing[3] = torch.nan
    for x in (nothing, missing):
        proxy = randomize(energy_nn(20, 3)(theta, x, None))
        with torch.no_grad():
            proxy.net.final_layer.weight *= 1000
            f = proxy(theta[None], x)
            proxy.net.final_layer.weight *= -1
            turned = proxy(theta[None], x)
        assert max(f.max(), turned.max()) > 100


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_proxy_is_normalisable_on_exponential_tails(sign):
    # A network that went on linearly would outgrow these tails.
    prior = Independent(Laplace(torch.zeros(1), torch.ones(1)), 1)
    theta = prior.sample((300,))
    x = theta + torch.randn(300, 1)
    proxy = randomize(energy_nn(20, 1)(theta, x, prior))
    with torch.no_grad():
        proxy.net.final_layer.weight *= 10 * sign

    def log_z(limit):
        points, cell = grid(-limit, limit, 40 * limit, 1)
        points = points.float().unsqueeze(1).expand(-1, 3, -1)
        return log_integral(proxy.log_unnormalized(points, x[:3]), cell)

    with torch.no_grad():
        # Steeper than the prior within the simulations, on either side or both.
        points = torch.tensor([-4.0, -3.0, 3.0, 4.0]).reshape(4, 1, 1)
        f = proxy(points.expand(-1, 3, -1), x[:3])
        assert torch.stack((f[0] - f[1], f[3] - f[2])).abs().max() > 2
        torch.testing.assert_close(log_z(300), log_z(1500), atol=1e-3, rtol=0)


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
    other = build().eval()
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
        ({"z_score_x": "all"}, "z_score_x must be .* got 'all'"),
        ({"hidden_features": 0}, "hidden_features must .* at least 1, got 0"),
        ({"hidden_features": 8.0}, "hidden_features must be an integer .* got 8.0"),
        ({"num_blocks": -1}, "num_blocks must be an integer of at least 0, got -1"),
        ({"dropout": 2.0}, r"dropout must be in \[0, 1\), got 2.0"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        energy_nn(**kwargs)


@pytest.mark.parametrize("likelihood", ["auto", "none"])
def test_without_gradients_it_is_the_same_part_by_part(likelihood, monkeypatch):
    proxy = randomize(build(likelihood=likelihood))
    if likelihood == "auto":
        proxy.weights.fill_(0.5)
    theta, x = simulations(50)
    points = theta + torch.randn(40, 50, 2)
    whole = proxy(points, x).detach()
    at_once = []
    inner = type(proxy)._negative_energy

    def count(self, theta, x):
        at_once.append(theta.shape[:2].numel())
        return inner(self, theta, x)

    monkeypatch.setattr(type(proxy), "_negative_energy", count)
    monkeypatch.setattr("sbi_jeffreys.energy.MAX_AT_ONCE", 300)
    with torch.no_grad():
        torch.testing.assert_close(proxy(points, x), whole)
        assert at_once == [280] * 7 + [40]
        # At one condition there is nothing to split.
        torch.testing.assert_close(proxy(points[:, :1], x[:1]), whole[:, :1])
    proxy(points, x)
    assert at_once[8:] == [40, 2000]
