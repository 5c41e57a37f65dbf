"""The last stage: the proxy's samples, and how much the flow follows."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LinearGaussianFlow,
    QuadraticEnergy,
    assert_equal,
    gaussian_proxy,
    gaussian_proxy_posterior,
    interrupt_before,
    make,
    outcome,
    simulate,
    train,
)
from sbi.utils import BoxUniform
from scipy import stats
from torch.distributions import MultivariateNormal

from sbi_jeffreys import (
    AdaptiveWeights,
    FixedWeights,
    JeffreysObjective,
    energy_nn,
    losses,
    sample_sets,
)
from sbi_jeffreys.base_measure import make_base_measure
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.losses import Batch
from sbi_jeffreys.objective import Divergences
from sbi_jeffreys.stages import Stage
from sbi_jeffreys.weights import ValidationDivergences

pytestmark = pytest.mark.filterwarnings(
    "ignore:Maximum number of epochs",
    "ignore:Training was interrupted",
    "ignore:When the inference object is pickled",
)

# ---------------------------------------------------------------- samples of the proxy


def narrow_net():
    """A correlated Gaussian, narrow beside all proposals."""
    covariance = torch.tensor([[0.09, 0.08], [0.08, 0.16]])
    root = torch.linalg.cholesky(torch.linalg.inv(covariance))
    return QuadraticEnergy(torch.zeros(2, 1), torch.tensor([1.0, -0.5]), root, 0.7)


def share_of_unique(theta):
    """Return the share of different samples, at the average condition."""
    counts = [len(theta[:, i].unique(dim=0)) for i in range(50)]
    return sum(counts) / (50 * len(theta))


@pytest.mark.parametrize("with_prior", [False, True])
def test_moved_samples_are_those_of_the_proxy(with_prior):
    """Where few proposals hit, plain resampling repeats them, and is off."""
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2)) if with_prior else None
    net = narrow_net()
    proxy, x = gaussian_proxy(net, prior), torch.zeros(2000, 1)
    with torch.no_grad():
        q, exact_log_z = gaussian_proxy_posterior(net, x[:1], prior)
    flow = LinearGaussianFlow(torch.zeros(2, 1), torch.zeros(2), torch.eye(2))
    sampler = JeffreysObjective(64, 64)

    def draw(num_moves):
        torch.manual_seed(0)
        proposals = sampler.propose(flow, proxy, x)
        samples = sampler.sample_proxy(proxy, x, proposals, 64, num_moves)
        whitened = torch.linalg.solve_triangular(
            q.scale_tril[0], (samples.theta - q.mean[0]).unsqueeze(-1), upper=False
        ).squeeze(-1)
        # Of two functions each, mean over the samples of a condition: of these the
        # conditions are independent.
        products = whitened[..., [0, 1, 0]] * whitened[..., [0, 1, 1]]
        means = torch.cat((whitened, products), -1).mean(0)
        return samples, means.mean(0), means.std(0) / math.sqrt(len(x))

    expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    plain, plain_moments, _ = draw(0)
    assert share_of_unique(plain.theta) < 0.4
    assert (plain_moments - expected)[2:4].max() > 0.02
    samples, moments, error = draw(10)
    assert samples.theta.shape == (64, 2000, 2)
    assert share_of_unique(samples.theta) > 0.9
    assert ((moments - expected).abs() < 4 * error + 0.01).all()
    assert error.max() < 0.02
    # Samples come with their own density, up to the estimate of log Z.
    with torch.no_grad():
        log_q = q.log_prob(samples.theta) + exact_log_z
    total = samples.log_prob + samples.log_partition
    torch.testing.assert_close(total, log_q.expand_as(total), atol=1e-3, rtol=1e-4)
    log_z = samples.log_partition
    assert (log_z.mean() - exact_log_z).abs() < 4 * log_z.std() / math.sqrt(2000) + 0.05
    assert not samples.theta.requires_grad and not samples.log_prob.requires_grad


def test_moves_respect_every_condition_and_the_support():
    """A Gaussian cut off by the box, elsewhere at every condition: scipy's."""
    box = BoxUniform(-2 * torch.ones(1), 2 * torch.ones(1))
    net = QuadraticEnergy(
        torch.ones(1, 1), torch.zeros(1), torch.tensor([[2.0]]), shift=-3.0
    )
    base = make_base_measure("prior", box, box.sample((500,)))
    proxy = ConditionalEnergy(net, base, torch.Size([1]), torch.Size([1]))
    centers = torch.tensor([[-1.9], [0.3], [2.5]])
    x = centers.repeat(400, 1)
    # A flow that leaks, and is elsewhere.
    flow = LinearGaussianFlow(-torch.ones(1, 1), torch.ones(1), 0.8 * torch.eye(1))
    sampler = JeffreysObjective(50, 50)
    proposals = sampler.propose(flow, proxy, x)
    samples = sampler.sample_proxy(proxy, x, proposals, 50, 8)
    assert (samples.theta.abs() <= 2).all()
    assert samples.log_prob.isfinite().all()
    for index, center in enumerate(centers[:, 0].tolist()):
        theta = samples.theta[:, index::3, 0]
        exact: Any = stats.truncnorm(2 * (-2 - center), 2 * (2 - center), center, 0.5)
        for k in (1, 2, 3):
            means = (theta - exact.mean()).pow(k).mean(0)
            moment = exact.expect(lambda t, k=k, m=exact.mean(): (t - m) ** k)
            error = means.std().item() / math.sqrt(400)
            assert means.mean().item() == pytest.approx(moment, abs=4 * error + 4e-3)
        log_q = torch.from_numpy(exact.logpdf(theta.double().numpy()))
        # log Z of the box's uniform density.
        log_z = samples.log_partition[index::3]
        inside: Any = stats.norm(center, 0.5)
        exact_log_z = (
            math.log(inside.cdf(2) - inside.cdf(-2))
            - math.log(4)
            - 3
            - inside.logpdf(center)
        )
        total = samples.log_prob[:, index::3].double() + log_z
        torch.testing.assert_close(total, log_q + exact_log_z, atol=1e-3, rtol=1e-4)
        assert log_z.mean().item() == pytest.approx(exact_log_z, abs=0.05)


# ------------------------------------------------------------ weights of the last stage


def divergences(advantage):
    """Return divergences that give a proxy this advantage with standard error one."""
    around = torch.tensor([-1.0, 1.0]) * math.sqrt(0.5) * math.sqrt(2)
    loss = torch.zeros(2)
    return ValidationDivergences(loss + advantage + around, torch.ones(2), loss)


def test_the_flow_is_asked_for_the_rest_of_its_divergence():
    weights = AdaptiveWeights()
    before = weights.state_dict()
    weights.measure_trust(divergences(1.0))
    assert weights.trust == pytest.approx(stats.norm.cdf(1.0), abs=1e-6)
    assert weights.forward_share == 1.0
    weights.start_distillation(0.7)
    share = 1 - 0.7 * stats.norm.cdf(1.0)
    assert weights.forward_share == pytest.approx(share, abs=1e-6)
    # It stays, though trust moves on.
    for _ in range(5):
        weights.update(divergences(-3.0))
    assert weights.flow_share < 0.5 * 0.7 * stats.norm.cdf(1.0)
    assert weights.forward_share == pytest.approx(share, abs=1e-6)
    other = AdaptiveWeights()
    other.load_state_dict(weights.state_dict())
    assert other.forward_share == weights.forward_share
    assert AdaptiveWeights().forward_share == 1.0
    fresh = AdaptiveWeights()
    fresh.load_state_dict(before)
    assert fresh.forward_share == 1.0
    # Another distillation, of a later round, has another.
    weights.start_round()
    weights.measure_trust(divergences(0.0))
    weights.start_distillation(1.0)
    assert weights.forward_share == pytest.approx(0.5)


def test_fixed_weights_ask_for_all_of_it():
    weights = FixedWeights((1.0, 2.0, 3.0))
    assert weights.forward_share == 1.0
    weights.measure_trust(divergences(1.0))
    weights.start_distillation(0.3)
    assert weights.forward_share == 1.0


def test_the_share_counts_in_the_last_stage_only():
    loss = torch.tensor([1.0, -4.0])
    # A network alone has learnt no more from the simulations than the flow.
    for likelihood, stage, expected in (
        ("auto", Stage.FLOW, 2 * loss),
        ("auto", Stage.DISTILLATION, loss / 2),
        ("none", Stage.DISTILLATION, 2 * loss),
    ):
        inference = make(energy_estimator=energy_nn(8, 1, likelihood=likelihood))
        train(inference, 2, simulate())
        weights = inference._weights
        weights.forward_share = 0.25
        weights.dual_variables = torch.tensor([2.0, 3.0, 5.0])
        inference._stage = stage
        assert torch.equal(inference._lagrangian(Divergences(loss)), expected)
        assert weights.dual_variables.tolist() == [2.0, 3.0, 5.0]


# ------------------------------------------------------------------------- in training


def small() -> Any:
    """Return an inference object whose flow follows the proxy from the start."""
    return make(weights="fixed", objective=JeffreysObjective(4, 4))


def following(monkeypatch, num_conditions):
    """Return a training that ended in its last stage, and where the flow followed."""
    monkeypatch.setattr(losses, "NUM_CONDITIONS", num_conditions)
    inference, followed = small(), []
    of_models = inference.objective.forward_kl_to_proxy

    def recording(flow, x, samples):
        if torch.is_grad_enabled():  # else on validation simulations
            followed.append((x, samples))
        return of_models(flow, x, samples)

    monkeypatch.setattr(inference.objective, "forward_kl_to_proxy", recording)
    train(inference, 14, simulate(150))
    assert inference.summary["stage"][-2:] == ["distillation"] * 2
    return inference, followed


def rows(x):
    return {tuple(row) for row in x.tolist()}


def test_few_simulations_are_filled_up_by_imagined_ones(monkeypatch):
    inference, followed = following(monkeypatch, 400)
    _, x = inference._simulations_of("training")
    imagined = inference._samples.imagined
    assert imagined is not None and imagined.shape == (400, x.shape[1])
    assert torch.equal(imagined[: len(x)], x)
    assert not rows(imagined[len(x) :]) & rows(x)
    # They are where those of the simulations are.
    assert (imagined.mean(0) - x.mean(0)).abs().max() < 0.5 * x.std(0).min()
    ratio = imagined[len(x) :].std(0) / x.std(0)
    assert ratio.min() > 0.7 and ratio.max() < 1.4
    # The flow follows the proxy at all of them, with samples of the proxy there.
    assert {len(x) for x, _ in followed} == {40}
    seen = set().union(*(rows(x) for x, _ in followed))
    assert seen < rows(imagined)
    assert len(seen & rows(x)) > 20 and len(seen - rows(x)) > 50
    proxy = inference._estimator.proxy
    with torch.no_grad():
        for outputs, samples in followed:
            assert len(samples.theta) == losses.NUM_POOLED_SAMPLES_PER_STEP
            log_q = proxy.log_unnormalized(samples.theta, outputs)
            torch.testing.assert_close(
                samples.log_prob + samples.log_partition, log_q, atol=1e-3, rtol=1e-4
            )


def test_of_many_simulations_none_are_imagined(monkeypatch):
    inference, followed = following(monkeypatch, 135)
    _, x = inference._simulations_of("training")
    assert len(x) == 135 and inference._samples.imagined is None
    assert set().union(*(rows(x) for x, _ in followed)) <= rows(x)


def test_a_network_alone_imagines_nothing():
    inference = make(
        weights="fixed", energy_estimator=energy_nn(8, 1, likelihood="none")
    )
    train(inference, 10, simulate(90))
    assert inference.summary["stage"][-1] == "distillation"
    assert inference._samples.imagined is None


def test_surrogates_without_weight_imagine_alike(monkeypatch):
    inference, _ = following(monkeypatch, 400)
    asked = []
    proxy = inference._estimator.proxy

    def recording(theta, x, weights):
        asked.append(weights.tolist())
        return x

    monkeypatch.setattr(proxy.likelihoods, "sample", recording)
    for given in ([0.0, 0.5, 0.0, 0.2], [0.0] * 4):
        proxy.weights[1:] = torch.tensor(given)
        inference._losses._imagine()
    assert asked == [pytest.approx([0.0, 0.5, 0.0, 0.2]), [1.0] * 4]


def test_the_calibration_kernel_counts_at_imagined_outputs(monkeypatch):
    inference, _ = following(monkeypatch, 400)
    training = inference._losses
    training.kernel = lambda x: (x[:, 0] > 0).float()
    theta, x = inference._simulations_of("training")
    batch = Batch(theta[:40], x[:40], torch.ones(40, 1), "training", torch.arange(40))
    torch.manual_seed(5)
    divergences, of_models = training.of_following_flow(batch, 0.5, False)
    training.kernel = lambda x: torch.ones(len(x))
    torch.manual_seed(5)
    unweighted = training.of_following_flow(batch, 0.5, False)[1]
    torch.manual_seed(5)
    outputs, _ = training._proxy_samples_anywhere(batch)
    kept = outputs[:, 0] > 0
    assert 0 < kept.sum() < 40
    assert not of_models[~kept].any()
    torch.testing.assert_close(of_models[kept], unweighted[kept])
    # Of the simulations' own losses the trainer takes care.
    assert divergences.forward_kl is not None and divergences.forward_kl.all()


def test_resumed_within_the_stage_as_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # unpickled trainers log where they are
    # The proxy's samples are drawn as the stage begins and anew after two epochs.
    monkeypatch.setattr(sample_sets, "NUM_PROXY_USES", 0.5)
    data, whole, part = simulate(90), small(), small()
    train(whole, 16, data)
    assert whole.summary["stage"][12:] == ["distillation"] * 4
    interrupt_before(part, 13)
    train(part, 16, data)
    before = part._samples.proxy_samples["training"].theta
    part.save("training.pt")
    unpickled = pickle.loads(pickle.dumps(part))
    unpickled._show_progress_bars = False
    interrupt_before(part, 14)
    train(part, 16, resume_training=True)
    ways = ((small().load("training.pt"), 13), (unpickled, 13), (part, 14))
    for resumed, epoch in ways:
        assert len(resumed.summary["stage"]) == epoch
        torch.manual_seed(77)  # what another process would have done
        np.random.seed(77)
        train(resumed, 16, resume_training=True, seed=8)
        assert_equal(outcome(resumed), outcome(whole))
        for name in ("training", "validation"):
            own, other = (
                vars(each._samples.proxy_samples[name]) for each in (resumed, whole)
            )
            assert_equal(own, other)
    assert not torch.equal(before, whole._samples.proxy_samples["training"].theta)
