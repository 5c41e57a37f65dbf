"""The three divergences and their gradients, against closed forms for Gaussians."""

from typing import NamedTuple

import pytest
import torch
from helpers import (
    LinearGaussianFlow,
    QuadraticEnergy,
    flat_gradient,
    gaussian_proxy,
    gaussian_proxy_posterior,
    grid,
    log_integral,
    mean_and_standard_error,
)
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from sbi_jeffreys import JeffreysObjective, energy_nn
from sbi_jeffreys.objective import ProxySamples, concatenate
from sbi_jeffreys.partition import LogPartition

PRIOR = MultivariateNormal(
    torch.tensor([0.5, -0.5]), torch.tensor([[2.0, 0.3], [0.3, 1.5]])
)
X = torch.tensor([[-1.0], [0.3], [1.5]])


@pytest.fixture
def flow():
    return LinearGaussianFlow(
        torch.tensor([[0.8], [-0.3]]),
        torch.tensor([0.1, 0.2]),
        torch.tensor([[0.7, 0.0], [0.3, 0.9]]),
    )


@pytest.fixture
def net():
    return QuadraticEnergy(
        torch.tensor([[1.0], [-0.5]]),
        torch.tensor([0.4, 0.0]),
        torch.tensor([[1.2, 0.0], [-0.3, 0.8]]),
        shift=1.5,
    )


@pytest.fixture(params=["prior", "lebesgue"])
def prior(request):
    return PRIOR if request.param == "prior" else None


@pytest.fixture
def proxy(net, prior):
    return gaussian_proxy(net, prior)


class Estimates(NamedTuple):
    """All three divergences at every simulation."""

    forward_kl: Tensor
    reverse_kl: Tensor
    proxy_forward_kl: Tensor
    log_partition: LogPartition


def estimate(objective, flow, proxy, theta, x=X, proposals=None):
    if proposals is None:
        proposals = objective.propose(flow, proxy, x)
    return Estimates(
        flow.loss(theta, x), *objective.proxy_divergences(proxy, theta, x, proposals)
    )


def test_divergences_of_gaussians(flow, net, proxy, prior):
    objective = JeffreysObjective(num_flow_samples=500, num_reference_samples=500)
    theta = PRIOR.sample((3,))
    q, log_z = gaussian_proxy_posterior(net, X, prior)

    exact = estimate(objective, flow, proxy, theta).forward_kl
    torch.testing.assert_close(exact, -flow.distribution(X).log_prob(theta))

    def values():
        d = estimate(objective, flow, proxy, theta)
        return torch.stack((
            d.reverse_kl,
            d.proxy_forward_kl,
            d.log_partition.value,
        )).detach()

    mean, error = mean_and_standard_error(values, repeats=40)
    expected = torch.stack((
        kl_divergence(flow.distribution(X), q),
        -q.log_prob(theta),
        log_z,
    ))
    # The logarithm of a mean is biased by some thousandths at 1,000 samples.
    assert ((mean - expected).abs() < 4 * error + 5e-3).all()
    assert error.max() < 0.03
    ess = estimate(objective, flow, proxy, theta).log_partition.effective_sample_size
    assert ((ess > 1) & (ess < 1000)).all()


def test_gradients_to_the_proxy(flow, net, proxy, prior):
    objective = JeffreysObjective(num_flow_samples=1000, num_reference_samples=1000)
    theta = PRIOR.sample((3,))
    q, _ = gaussian_proxy_posterior(net, X, prior)
    exact = {
        "reverse_kl": kl_divergence(flow.distribution(X), q).sum(),
        "proxy_forward_kl": -q.log_prob(theta).sum(),
    }
    for name, loss in exact.items():
        expected = flat_gradient(loss, net)
        mean, error = mean_and_standard_error(
            lambda name=name: flat_gradient(
                getattr(estimate(objective, flow, proxy, theta), name).sum(), net
            ),
            repeats=40,
        )
        assert expected.norm() > 0.5
        # A ratio of means: biased by a per cent at this number of samples.
        assert ((mean - expected).abs() < 4 * error + 0.02).all(), name
        assert error.max() < 0.1


def test_forward_divergence_trains_only_the_flow(flow, proxy):
    d = estimate(JeffreysObjective(), flow, proxy, PRIOR.sample((3,)))
    assert all(
        g is None
        for g in torch.autograd.grad(
            d.forward_kl.sum(), list(proxy.parameters()), allow_unused=True
        )
    )
    for loss in (d.reverse_kl, d.proxy_forward_kl):
        gradients = torch.autograd.grad(
            loss.sum(), list(flow.parameters()), allow_unused=True, retain_graph=True
        )
        assert all(g is None for g in gradients)


def test_path_gradient_is_that_of_the_divergence(flow, net, proxy, prior):
    objective = JeffreysObjective(num_reverse_samples=500)
    q, log_z = gaussian_proxy_posterior(net, X, prior)
    divergence = kl_divergence(flow.distribution(X), q)
    expected = flat_gradient(divergence.sum(), flow)

    mean, error = mean_and_standard_error(
        lambda: objective.reverse_kl_of_flow(flow, proxy, X, log_z).detach(), 40
    )
    assert ((mean - divergence).abs() < 4 * error).all()

    mean, error = mean_and_standard_error(
        lambda: flat_gradient(
            objective.reverse_kl_of_flow(flow, proxy, X, log_z).sum(), flow
        ),
        repeats=40,
    )
    assert expected.norm() > 1
    assert ((mean - expected).abs() < 4 * error + 1e-4).all()
    assert error.max() < 0.1


def test_path_gradient_vanishes_where_the_models_agree(net):
    proxy = gaussian_proxy(net)
    q, log_z = gaussian_proxy_posterior(net, X)
    flow = LinearGaussianFlow(
        net.weight.detach(), net.center.detach(), q.scale_tril.detach()[0]
    )
    objective = JeffreysObjective(num_reverse_samples=1)
    divergence = objective.reverse_kl_of_flow(flow, proxy, X, log_z)
    torch.testing.assert_close(divergence, torch.zeros(3), atol=1e-5, rtol=0)
    # One sample suffices: every path is flat, not only their mean.
    assert flat_gradient(divergence.sum(), flow).abs().max() < 1e-5
    assert all(parameter.grad is None for parameter in net.parameters())


def test_reverse_divergence_of_the_flow_leaves_the_proxy(flow, net, proxy):
    value = JeffreysObjective().reverse_kl_of_flow(flow, proxy, X, torch.zeros(3))
    gradients = torch.autograd.grad(
        value.sum(), list(net.parameters()), allow_unused=True
    )
    assert all(g is None or (g == 0).all() for g in gradients)


# ------------------------------------------------------- samples of the proxy, and both
# divergences between the models


@pytest.fixture(params=["box", "normal"])
def line(request):
    """A proxy of one parameter with its density on a grid, and a poor flow."""
    prior = BoxUniform(-2 * torch.ones(1), 2 * torch.ones(1))
    limit = 2
    if request.param == "normal":
        prior, limit = MultivariateNormal(torch.zeros(1), torch.eye(1)), 5
    simulated = prior.sample((300,))
    outputs = simulated + 0.5 * torch.randn(300, 1)
    proxy = energy_nn(20, 1, likelihood="none")(simulated, outputs, prior).eval()
    torch.nn.init.normal_(proxy.net.final_layer.weight, std=0.7)
    # It leaks beyond the box, and is elsewhere than the proxy.
    flow = LinearGaussianFlow(-torch.ones(1, 1), torch.ones(1), 0.8 * torch.eye(1))
    points, cell = grid(-limit, limit, 4000, 1)
    points = points.float().unsqueeze(1).expand(-1, 3, -1)
    with torch.no_grad():
        log_q = proxy.log_unnormalized(points, X)
    return flow, proxy, points, log_q, cell


def test_samples_of_the_proxy_against_quadrature(line):
    flow, proxy, points, log_unnormalized, cell = line
    log_z = log_integral(log_unnormalized, cell)
    log_q = log_unnormalized - log_z

    def moments(theta, log_q, weights):
        """Of all that the samples come with: location, width, shape and entropy."""
        theta = theta[..., 0]
        functions = (theta, theta**2, (3 * theta).sin(), log_q)
        return torch.stack([(weights * values).sum(0) for values in functions])

    expected = moments(points, log_q, log_q.exp() * cell)
    objective = JeffreysObjective(400, 400)

    def estimates():
        proposals = objective.propose(flow, proxy, X)
        drawn = objective.sample_proxy(proxy, X, proposals, 300)
        assert drawn.theta.shape == (300, 3, 1)
        assert drawn.log_prob.shape == (300, 3)
        assert drawn.log_partition.shape == drawn.effective_sample_size.shape == (3,)
        assert not drawn.theta.requires_grad and not drawn.log_prob.requires_grad
        assert proxy.base.log_prob(drawn.theta).isfinite().all()
        torch.testing.assert_close(
            drawn.log_prob + drawn.log_partition,
            proxy.log_unnormalized(drawn.theta, X).detach(),
        )
        found = moments(drawn.theta, drawn.log_prob, torch.full((300, 3), 1 / 300))
        return torch.cat((found, drawn.log_partition[None]))

    mean, error = mean_and_standard_error(estimates, repeats=100)
    expected = torch.cat((expected, log_z[None]))
    # Resampling from 800 is biased by less than a hundredth.
    assert ((mean - expected).abs() < 4 * error + 0.01).all()
    assert error.max() < 0.02
    # Those of the proposals, all alike, would be others.
    theta = objective.propose(flow, proxy, X, multiple=20).theta[..., 0]
    assert ((theta.mean(0) - expected[0]).abs() > 8 * error[0] + 0.05).any()


def test_samples_of_the_proxy_have_its_weights(flow, net, proxy, prior):
    """In two dimensions, against the closed form; and how even the weights are."""
    objective = JeffreysObjective(1000, 1000)
    q, log_z = gaussian_proxy_posterior(net, X, prior)

    def estimates():
        proposals = objective.propose(flow, proxy, X)
        drawn = objective.sample_proxy(proxy, X, proposals, 1000)
        theta = drawn.theta - q.mean
        covariance = torch.einsum("sbi,sbj->bij", theta, theta) / 1000
        log_prob = (drawn.log_prob - q.log_prob(drawn.theta)).mean(0)
        assert (drawn.effective_sample_size > 50).all()
        assert (drawn.effective_sample_size < 2000).all()
        parts = theta.mean(0), covariance.flatten(1), log_prob[:, None]
        return torch.cat(parts, 1).detach()

    mean, error = mean_and_standard_error(estimates, repeats=40)
    covariances = q.covariance_matrix.expand(3, 2, 2).flatten(1)
    expected = torch.cat((torch.zeros(3, 2), covariances, torch.zeros(3, 1)), 1)
    assert ((mean - expected).abs() < 4 * error + 5e-3).all()
    assert error.max() < 0.05


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_where_no_weight_is_a_number_any_sample_is_drawn(flow, proxy, value):
    objective = JeffreysObjective(6, 4)
    proposals = objective.propose(flow, proxy, X)
    proposals.log_weights[:, 1] = value
    drawn = objective.sample_proxy(proxy, X, proposals, 200)
    assert drawn.theta.isfinite().all()
    assert len(drawn.theta[:, 1].unique(dim=0)) == 10
    assert drawn.log_prob[:, [0, 2]].isfinite().all()
    assert not drawn.log_prob[:, 1].isfinite().any()


def test_samples_of_the_proxy_at_some_conditions(flow, proxy):
    objective = JeffreysObjective(20, 20)
    x = torch.randn(5, 1)
    whole = objective.sample_proxy(proxy, x, objective.propose(flow, proxy, x), 7)
    index = torch.tensor([3, 0, 3])
    part = whole.at(index)
    halves = [whole.at(torch.arange(2)), whole.at(torch.arange(2, 5))]
    joined = concatenate(halves, len(x))
    few = whole.subset(3)
    assert few.theta.shape == (3, 5, 2)
    for name, value in vars(whole).items():
        axis = 0 if value.ndim == 1 else 1
        assert torch.equal(getattr(part, name), value.index_select(axis, index))
        assert torch.equal(getattr(joined, name), value)
    # Samples and densities of a subset belong together, and none is taken twice.
    log_q = proxy.log_unnormalized(few.theta, x) - few.log_partition
    torch.testing.assert_close(few.log_prob, log_q.detach())
    assert torch.equal(few.log_partition, whole.log_partition)
    torch.testing.assert_close(
        whole.subset(7).log_prob.sort(0).values, whole.log_prob.sort(0).values
    )
    chosen = torch.stack([whole.subset(3).log_prob[:, 0].sum() for _ in range(400)])
    spread = chosen.std() / 400**0.5
    assert (chosen.mean() / 3 - whole.log_prob[:, 0].mean()).abs() < 4 / 3 * spread


def exact_samples(q, log_z, num):
    """Return samples of a Gaussian proxy as it would draw them, but independent."""
    theta = q.sample(torch.Size((num,)))
    size = torch.full((len(log_z),), float(num))
    return ProxySamples(theta, q.log_prob(theta), log_z, size)


def test_forward_divergence_to_the_proxy_and_its_gradient(flow, net, proxy, prior):
    objective = JeffreysObjective()
    q, log_z = gaussian_proxy_posterior(net, X, prior)
    q = MultivariateNormal(q.mean.detach(), q.covariance_matrix.detach())
    log_z = log_z.detach()
    divergence = kl_divergence(q, flow.distribution(X))
    gradient = flat_gradient(divergence.sum(), flow)
    assert gradient.norm() > 1

    def estimates():
        samples = exact_samples(q, log_z, 500)
        value = objective.forward_kl_to_proxy(flow, X, samples)
        assert value.shape == (3,)
        return torch.cat((value.detach(), flat_gradient(value.sum(), flow)))

    mean, error = mean_and_standard_error(estimates, repeats=40)
    expected = torch.cat((divergence.detach(), gradient))
    assert ((mean - expected).abs() < 4 * error + 1e-5).all()
    assert error.max() < 0.2

    # From the samples that the proxy draws itself, the same.
    wide = JeffreysObjective(1000, 1000)

    def own():
        drawn = wide.sample_proxy(proxy, X, wide.propose(flow, proxy, X), 500)
        value = wide.forward_kl_to_proxy(flow, X, drawn)
        gradients = torch.autograd.grad(
            value.sum(), list(net.parameters()), allow_unused=True, retain_graph=True
        )
        assert all(each is None for each in gradients)
        return torch.cat((value.detach(), flat_gradient(value.sum(), flow)))

    mean, error = mean_and_standard_error(own, repeats=40)
    assert ((mean - expected).abs() < 4 * error + 0.01 * gradient.norm()).all()


def in_double_precision(flow, net):
    flow, net = flow.double(), net.double()
    proxy = gaussian_proxy(net)
    q, log_z = gaussian_proxy_posterior(net, X.double())
    q = MultivariateNormal(q.mean.detach(), q.covariance_matrix.detach())
    return flow, proxy, q, log_z.detach()


def finite_differences(function, flow, step=1e-5):
    """Return the gradient of a function of no arguments to a flow's parameters."""
    gradient = []
    with torch.no_grad():
        for parameter in flow.parameters():
            for index in range(parameter.numel()):
                values = []
                for sign in (1, -1):
                    parameter.view(-1)[index] += sign * step
                    values.append(function())
                    parameter.view(-1)[index] -= sign * step
                gradient.append((values[0] - values[1]) / (2 * step))
    return torch.stack(gradient)


def test_one_pass_of_the_flow_gives_both_of_its_forward_divergences(flow, net):
    proxy = gaussian_proxy(net)
    objective, theta = JeffreysObjective(), torch.randn(3, 2)
    samples = objective.sample_proxy(proxy, X, objective.propose(flow, proxy, X), 5)
    losses = objective.forward_kls_of_flow(flow, theta, X, samples)
    expected = flow.loss(theta, X), objective.forward_kl_to_proxy(flow, X, samples)
    for loss, wanted in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(
            flat_gradient(loss.sum(), flow), flat_gradient(wanted.sum(), flow)
        )
    assert (losses[0] - losses[1]).abs().min() > 1e-3


def test_gradients_of_both_divergences_by_finite_differences(flow, net):
    flow, proxy, q, log_z = in_double_precision(flow, net)
    x, objective = X.double(), JeffreysObjective(num_reverse_samples=20_000)
    samples = exact_samples(q, log_z, 50)

    def forward():
        return objective.forward_kl_to_proxy(flow, x, samples).sum()

    torch.testing.assert_close(
        flat_gradient(forward(), flow), finite_differences(forward, flow)
    )

    # Of the reverse one the value of one method, and the gradient of the other; with
    # the same random numbers, that of the samples that move.
    def reverse():
        torch.manual_seed(3)
        return objective.reverse_kl(flow, proxy, x, log_z, 20_000).sum()

    value = objective.reverse_kl_of_flow(flow, proxy, x, log_z)
    path = flat_gradient(value.sum(), flow)
    assert path.norm() > 1
    differences = finite_differences(reverse, flow)
    # The score, which the path gradient leaves out, is zero in the mean alone.
    assert ((path - differences).abs() < 0.02 * path.norm()).all()


def test_reverse_divergence_of_fresh_samples(flow, net, proxy, prior):
    objective = JeffreysObjective()
    q, log_z = gaussian_proxy_posterior(net, X, prior)
    divergence = kl_divergence(flow.distribution(X), q)

    def estimates():
        value = objective.reverse_kl(flow, proxy, X, log_z, 500)
        assert value.shape == (3,)
        assert not value.requires_grad
        return value

    mean, error = mean_and_standard_error(estimates, repeats=40)
    assert ((mean - divergence).abs() < 4 * error).all()
    assert error.max() < 0.03
    # They are fresh: no two are the same.
    assert not torch.equal(estimates(), estimates())
    # Log Z enters as it is given.
    torch.manual_seed(0)
    value = estimates()
    torch.manual_seed(0)
    shifted = objective.reverse_kl(flow, proxy, X, log_z + torch.arange(3), 500)
    torch.testing.assert_close(shifted, value + torch.arange(3))


def test_reverse_divergence_is_that_of_the_flow_within_the_support(line):
    flow, proxy, points, log_unnormalized, cell = line
    log_z = log_integral(log_unnormalized, cell)
    with torch.no_grad():
        log_p = flow.log_prob(points, X)
        log_share = log_integral(log_p, cell)
        log_p = log_p - log_share  # cut off, and normalised again
        ratio = log_p - log_unnormalized + log_z
        expected = log_share.exp() * (log_p.exp() * ratio).sum(0) * cell
    objective = JeffreysObjective(2000, 2000)

    def estimates():
        proposals = objective.propose(flow, proxy, X)
        of_proxy = objective.proxy_divergences(proxy, torch.zeros(3, 1), X, proposals)
        return torch.stack((
            objective.reverse_kl(flow, proxy, X, log_z, 4000),
            of_proxy[0].detach(),
        ))

    mean, error = mean_and_standard_error(estimates, repeats=50)
    assert ((mean - expected).abs() < 4 * error + 0.005).all()
    assert error.max() < 0.02


def test_an_energy_beyond_the_support_has_no_say(line):
    flow, proxy, *_ = line

    class Raised(torch.nn.Module):
        """The same energy, but for what lies beyond the prior."""

        def __init__(self):
            super().__init__()
            self.height = torch.nn.Parameter(torch.tensor(30.0))

        def forward(self, theta, x):
            beyond = torch.isneginf(proxy.base.log_prob(theta.detach()))
            steep = self.height * theta[..., 0]
            return inner(theta, x) + torch.where(beyond, self.height + steep, 0.0)

    objective = JeffreysObjective(100, 100, num_reverse_samples=100)
    proposals = objective.propose(flow, proxy, X)
    theta, log_z = torch.zeros(3, 1), torch.zeros(3)
    inner, raised = proxy.net, Raised()
    results = []
    for net in (inner, raised):
        proxy.net = net
        torch.manual_seed(2)
        divergences = objective.proxy_divergences(proxy, theta, X, proposals)
        value = objective.reverse_kl(flow, proxy, X, log_z, 100)
        of_flow = objective.reverse_kl_of_flow(flow, proxy, X, log_z)
        results.append([
            divergences[0],
            value,
            flat_gradient(of_flow.sum(), flow),
        ])
    for plain, changed in zip(*results, strict=True):
        torch.testing.assert_close(plain, changed)
    (slope,) = torch.autograd.grad(
        divergences[0].sum(), raised.height, allow_unused=True
    )
    assert slope is None or slope == 0


def test_no_divergence_between_models_that_agree(net):
    proxy = gaussian_proxy(net)
    q, log_z = gaussian_proxy_posterior(net, X)
    flow = LinearGaussianFlow(
        net.weight.detach(), net.center.detach(), q.scale_tril.detach()[0]
    )
    objective = JeffreysObjective()
    samples = exact_samples(q, log_z, 20)
    for value in (
        objective.forward_kl_to_proxy(flow, X, samples),
        objective.reverse_kl(flow, proxy, X, log_z, 20),
    ):
        torch.testing.assert_close(value.detach(), torch.zeros(3), atol=1e-5, rtol=0)


def test_proposals_of_some_conditions(flow, proxy):
    objective = JeffreysObjective(num_flow_samples=6, num_reference_samples=4)
    x, theta = torch.randn(5, 1), PRIOR.sample((5,))
    proposals = objective.propose(flow, proxy, x)
    assert proposals.theta.shape == (10, 5, 2)
    assert not proposals.theta.requires_grad
    index = torch.tensor([3, 0, 3])
    whole = estimate(objective, flow, proxy, theta, x, proposals)
    part = estimate(objective, flow, proxy, theta[index], x[index], proposals.at(index))
    for name in ("forward_kl", "reverse_kl", "proxy_forward_kl"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[index])
    torch.testing.assert_close(
        part.log_partition.value, whole.log_partition.value[index]
    )
    halves = [proposals.at(torch.arange(2)), proposals.at(torch.arange(2, 5))]
    joined = estimate(objective, flow, proxy, theta, x, concatenate(halves, len(x)))
    assert torch.equal(joined.reverse_kl, whole.reverse_kl)


def test_subsets_of_proposals_have_the_mixture_of_the_whole(flow, net, proxy, prior):
    objective = JeffreysObjective(num_flow_samples=12, num_reference_samples=4)
    proposals = objective.propose(flow, proxy, X, multiple=5)
    assert proposals.theta.shape == (80, 3, 2)
    assert proposals.log_weights.shape == (80, 3)
    assert proposals.log_ratio.shape == (60, 3)
    theta = PRIOR.sample((3,))

    def estimates(proposals):
        d = estimate(objective, flow, proxy, theta, proposals=proposals)
        log_z = d.log_partition.value
        # The samples' part of the divergence: linear in them, as Z itself is.
        return torch.stack((log_z.exp(), d.reverse_kl - log_z)).detach()

    def of_subset():
        part = proposals.subset(12, 4)
        assert part.theta.shape == (16, 3, 2)
        assert part.log_ratio.shape == (12, 3)
        # Samples, weights and ratios of a subset belong together, and none is twice.
        same = (part.theta[:, None, 0] == proposals.theta[:, 0]).all(-1)
        assert (same.sum(1) == 1).all() and (same.sum(0) <= 1).all()
        index = same.double().argmax(1)
        assert (index[:12] < 60).all() and (index[12:] >= 60).all()
        assert torch.equal(part.log_weights, proposals.log_weights[index])
        assert torch.equal(part.log_ratio, proposals.log_ratio[index[:12]])
        return estimates(part)

    mean, error = mean_and_standard_error(of_subset, repeats=1000)
    whole = estimates(proposals)
    assert (error > 0).all()
    assert ((mean - whole).abs() < 4 * error).all()
    # A subset of another ratio has another mean, which the comparison would see.
    wrong, _ = mean_and_standard_error(
        lambda: estimates(proposals.subset(4, 12)), repeats=1000
    )
    assert ((wrong - whole)[0].abs() > 8 * error[0]).any()


def test_a_subset_of_more_than_there_are_is_the_whole(flow, proxy):
    objective = JeffreysObjective(num_flow_samples=6, num_reference_samples=3)
    proposals = objective.propose(flow, proxy, X)
    part = proposals.subset(12, 6)
    for one, other in (
        (part.log_ratio, proposals.log_ratio),
        (part.log_weights[:6], proposals.log_weights[:6]),
        (part.log_weights, proposals.log_weights),
    ):
        assert torch.equal(one.sort(0).values, other.sort(0).values)


def test_many_subsets_are_as_good_as_new_proposals(flow, net, proxy, prior):
    objective = JeffreysObjective(num_flow_samples=20, num_reference_samples=20)
    proposals = objective.propose(flow, proxy, X, multiple=100)
    theta = PRIOR.sample((3,))
    _, log_z = gaussian_proxy_posterior(net, X, prior)

    def partition():
        part = proposals.subset(20, 20)
        d = estimate(objective, flow, proxy, theta, proposals=part)
        return d.log_partition.value.exp().detach()

    mean, error = mean_and_standard_error(partition, repeats=1000)
    # The whole has an error of its own, that of 4,000 samples.
    whole = estimate(objective, flow, proxy, theta, proposals=proposals).log_partition
    tolerance = 4 * (error**2 + (whole.standard_error * log_z.exp()) ** 2).sqrt()
    assert ((mean - log_z.exp()).abs() < tolerance).all()


def test_stale_proposals_stay_exact(flow, net, proxy, prior):
    objective = JeffreysObjective(num_flow_samples=4000, num_reference_samples=4000)
    proposals = objective.propose(flow, proxy, X)
    with torch.no_grad():  # both models move on
        flow.bias += torch.tensor([1.0, -1.5])
        flow.root *= 0.5
        net.center += 0.5
    _, log_z = gaussian_proxy_posterior(net, X, prior)
    d = estimate(objective, flow, proxy, PRIOR.sample((3,)), proposals=proposals)
    error = d.log_partition.standard_error
    assert ((d.log_partition.value - log_z).abs() < 4 * error).all()
    assert error.max() < 0.1


def test_samples_beyond_the_prior_are_led_back():
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((300,))
    x = theta[:, :1].clone()
    proxy = energy_nn(10, 1)(theta, x, prior)  # flat: only the prior speaks
    flow = LinearGaussianFlow(torch.zeros(2, 1), ones := torch.ones(2), torch.eye(2))
    objective = JeffreysObjective(16, 16, num_reverse_samples=200)

    def leakage():
        samples = flow.sample(torch.Size((5000,)), x[:1])
        return (samples.abs() > 1).any(-1).double().mean().item()

    d = estimate(objective, flow, proxy, theta, x)
    for part in (d.forward_kl, d.reverse_kl, d.proxy_forward_kl, d.log_partition.value):
        assert torch.isfinite(part).all()
    before = leakage()
    for _ in range(30):
        divergence = objective.reverse_kl_of_flow(
            flow, proxy, x[:20], d.log_partition.value[:20]
        ).mean()
        assert torch.isfinite(divergence)
        gradients = torch.autograd.grad(divergence, [flow.bias, flow.root])
        with torch.no_grad():
            flow.bias -= 0.03 * gradients[0]
            flow.root -= 0.03 * gradients[1]
    assert flow.bias.norm() < 0.3 * ones.norm()
    assert leakage() < 0.6 * before


@pytest.mark.parametrize("dim", [1, 2])
def test_divergences_of_a_network_against_quadrature(dim):
    prior = BoxUniform(-2 * torch.ones(dim), 2 * torch.ones(dim))
    simulated = prior.sample((300,))
    # Outputs with noise: without it the residual coordinate goes through its range
    # within a hundredth of the parameter's, which is finer than the grid.
    outputs = simulated[:, :1] + 0.3 * torch.randn(300, 1)
    proxy = energy_nn(20, 1, likelihood="none")(simulated, outputs, prior).eval()
    torch.nn.init.normal_(proxy.net.final_layer.weight, std=0.7)
    # Narrow enough to leak less than the quadrature sees.
    flow = LinearGaussianFlow(
        torch.full((dim, 1), 0.3), torch.zeros(dim), 0.3 * torch.eye(dim)
    )
    points, cell = grid(-2, 2, 2000 if dim == 1 else 200, dim)
    points = points.float().unsqueeze(1).expand(-1, 3, -1)
    x, theta = X.clamp(-1, 1), prior.sample((3,))

    log_q = proxy.log_unnormalized(points, x)
    log_z = log_integral(log_q, cell)
    log_p = flow.log_prob(points, x)
    reverse = (log_p.exp() * (log_p - log_q)).sum(0) * cell + log_z
    proxy_forward = log_z - proxy.log_unnormalized(theta[None], x)[0]

    objective = JeffreysObjective(1000, 1000, num_reverse_samples=1000)

    def values():
        d = estimate(objective, flow, proxy, theta, x)
        of_flow = objective.reverse_kl_of_flow(flow, proxy, x, log_z)
        return torch.stack((d.reverse_kl, of_flow, d.proxy_forward_kl)).detach()

    mean, error = mean_and_standard_error(values, 30)
    expected = torch.stack((reverse, reverse, proxy_forward)).detach()
    assert ((mean - expected).abs() < 4 * error + 5e-3).all()

    for name, exact in (("reverse_kl", reverse), ("proxy_forward_kl", proxy_forward)):
        exact = flat_gradient(exact.sum(), proxy)
        mean, error = mean_and_standard_error(
            lambda name=name: flat_gradient(
                getattr(estimate(objective, flow, proxy, theta, x), name).sum(), proxy
            ),
            30,
        )
        assert (mean - exact).norm() < 0.05 * exact.norm(), name
        # The errors of some hundred weights are correlated: their length, not each.
        assert (mean - exact).norm() < 4 * error.norm() + 0.01 * exact.norm(), name

    exact = flat_gradient(reverse.sum(), flow)
    mean, error = mean_and_standard_error(
        lambda: flat_gradient(
            objective.reverse_kl_of_flow(flow, proxy, x, log_z).sum(), flow
        ),
        30,
    )
    assert ((mean - exact).abs() < 4 * error + 0.01 * exact.norm()).all()


@pytest.mark.parametrize(
    "name", ["num_flow_samples", "num_reference_samples", "num_reverse_samples"]
)
def test_bad_numbers_of_samples(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        JeffreysObjective(**{name: 0})
