"""The comparison of the models and the check of a fit.

Against closed forms where they exist; and by how often they raise an alarm, on good
fits, on simulators that are wrong, and far from the simulations.
"""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from helpers import LinearGaussianFlow, QuadraticEnergy, gaussian_proxy
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import FCEmbedding, PermutationInvariantEmbedding
from sbi.utils import BoxUniform
from torch.distributions import MultivariateNormal, kl_divergence

from sbi_jeffreys import (
    JeffreysEstimator,
    JeffreysNPE,
    ModelComparison,
    NoTracker,
    check_fit,
    compare_models,
    energy_nn,
)
from sbi_jeffreys.base_measure import make_base_measure
from sbi_jeffreys.diagnostics import _compare, _novelty
from sbi_jeffreys.energy import ConditionalEnergy

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs")

# ---------------------------------------------------------------------- closed forms

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))


def simulate(num, noise=0.5):
    theta = PRIOR.sample((num,))
    return theta, theta + noise * torch.randn(num, 2)


def train_gaussians(shift=0.0, width=1.0, tilt=0.0, proxy_width=1.0, num=400, **kwargs):
    """Train closed forms so slowly that they stay.

    The posterior is N(0.8 x, 0.2). The flow is `width` as wide and off by `shift` and
    by `tilt` times x; the proxy is `proxy_width` as wide. Without simulations there
    is no training.
    """
    root = width * 0.2**0.5 * torch.eye(2)
    weight = torch.tensor([[0.8 + tilt, 0.0], [0.0, 0.8]])
    flow = LinearGaussianFlow(weight, torch.full((2,), shift), root)
    # What is left of the proxy's precision without the prior's, which is one.
    precision = 5 / proxy_width**2 - 1
    net = QuadraticEnergy(
        0.8 * (1 + 1 / precision) * torch.eye(2),
        torch.zeros(2),
        precision**0.5 * torch.eye(2),
        shift=3.0,
    )
    inference = JeffreysNPE(
        PRIOR,
        lambda theta, x: flow,
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=lambda theta, x, prior: gaussian_proxy(net, PRIOR),
    )
    if num > 0:
        inference.append_simulations(*simulate(num))
        inference.train(learning_rate=1e-12, max_num_epochs=1, **kwargs)
    return inference


def test_comparison_of_gaussians():
    inference = train_gaussians(shift=0.2, width=1.2)
    comparison = compare_models(inference, num_samples=4000)
    assert isinstance(comparison, ModelComparison)
    assert len(comparison) == 40
    theta, x, _ = inference.get_simulations()
    index = inference.val_indices
    assert torch.equal(comparison.theta, theta[index])
    assert torch.equal(comparison.x, x[index])
    assert comparison.from_prior.all()
    theta, x = theta[index], x[index]
    p = MultivariateNormal(0.8 * x + 0.2, 1.44 * 0.2 * torch.eye(2))
    q = MultivariateNormal(0.8 * x, 0.2 * torch.eye(2))
    for values, expected, error in (
        (comparison.flow_loss, -p.log_prob(theta), 1e-4),
        (comparison.proxy_loss, -q.log_prob(theta), 0.1),
        (comparison.flow_to_proxy, kl_divergence(p, q), 0.1),
        (comparison.proxy_to_flow, kl_divergence(q, p), 0.1),
        (
            comparison.disagreement,
            kl_divergence(q, p) + kl_divergence(p, q),
            0.1,
        ),
    ):
        assert values.shape == (40,)
        torch.testing.assert_close(values, expected, atol=error, rtol=0)
        # The mean over simulations has no bias beyond its own error.
        assert (values - expected).mean().abs() < 0.02
    # E_p[(q / p)^2] of Gaussians, by sampling q: E_q[q / p].
    samples = q.sample((20_000,))
    ratio = (q.log_prob(samples) - p.log_prob(samples)).exp().mean(0)
    torch.testing.assert_close(
        comparison.relative_ess.mean(), (1 / ratio).mean(), atol=0.04, rtol=0
    )
    # Squared distances over the flow's variance are exponential.
    squares = (theta - p.mean).square().sum(-1) / (1.44 * 0.2)
    torch.testing.assert_close(
        comparison.levels, 1 - torch.exp(-squares / 2), atol=0.05, rtol=0
    )


def test_levels_within_a_bounded_prior():
    # A flow that is uniform on twice the prior's width, in one dimension: regions are
    # those of the posterior, cut at the prior's bounds.
    prior = BoxUniform(torch.zeros(1), torch.ones(1))
    flow = LinearGaussianFlow(torch.zeros(1, 1), torch.zeros(1), torch.eye(1))
    inference = JeffreysNPE(
        prior,
        lambda theta, x: flow,
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(4, 1),
    )
    theta = prior.sample((100,))
    inference.append_simulations(theta, torch.randn(100, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.train(learning_rate=1e-12, max_num_epochs=1)
    comparison = compare_models(inference, num_samples=20_000)
    # |z| < t within (0, 1), of a normal density that falls from 0 on.
    normal = torch.distributions.Normal(0.0, 1.0)
    mass = (normal.cdf(comparison.theta) - 0.5) / (normal.cdf(torch.ones(1)) - 0.5)
    torch.testing.assert_close(comparison.levels, mass.squeeze(1), atol=0.03, rtol=0)
    assert comparison.flow_to_proxy.isfinite().all()
    # Half the flow's mass is beyond the prior, which the weights count.
    share = (normal.cdf(torch.ones(1)) - 0.5).item()
    assert comparison.relative_ess.max() < share + 0.02


def test_the_energy_beyond_the_prior_does_not_count():
    class Step(torch.nn.Module):
        """Flat within the prior, and far below it beyond."""

        def forward(self, theta, x):
            return torch.where((theta.abs() > 1).any(-1), -500.0, 0.0)

    # Flow and proxy agree but for what leaks: one in a hundred.
    prior = BoxUniform(-torch.ones(1), torch.ones(1))
    scale = torch.full((1, 1), 1 / 2.576)
    flow = LinearGaussianFlow(torch.zeros(1, 1), torch.zeros(1), scale)
    theta, x = prior.sample((200,)), torch.zeros(200, 1)
    base = make_base_measure("prior", prior, theta)
    proxy = ConditionalEnergy(Step(), base, torch.Size([1]), torch.Size([1]))
    torch.manual_seed(0)
    parts = _compare(JeffreysEstimator(flow, proxy), x[:50], 4000)
    # The normal density against the uniform one within, and the way back beyond.
    z = torch.linspace(-2.576, 2.576, 10_001).double()
    log_p = torch.distributions.Normal(0, 1).log_prob(z) + math.log(2.576)
    within = ((log_p - math.log(0.5)) * log_p.exp()).mean() * 2
    assert (parts["flow_to_proxy"].mean() - within).abs() < 0.1


def test_a_flow_without_any_density_at_most_parameters():
    # So narrow that samples of the prior have none in single precision.
    width, precision = 1e-19, 900.0
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    zero = torch.zeros(1, 1), torch.zeros(1)
    flow = LinearGaussianFlow(*zero, torch.full((1, 1), width))
    net = QuadraticEnergy(*zero, torch.full((1, 1), precision**0.5))
    torch.manual_seed(0)
    estimator = JeffreysEstimator(flow, gaussian_proxy(net, prior))
    parts = _compare(estimator, torch.zeros(20, 1), 1000)
    # The proxy's precision is that of energy and prior together.
    expected = 0.5 / ((precision + 1) * width**2)
    assert parts["proxy_to_flow"].mean().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("width", "coverage"), [(1.0, 0.9), (0.5, 0.4377)])
def test_coverage(width, coverage):
    comparison = compare_models(train_gaussians(width=width), simulate(2000))
    assert comparison.coverage(0.9) == pytest.approx(coverage, abs=0.03)
    error, p_value = comparison.calibration_test()
    assert (p_value > 0.01) if width == 1 else (p_value < 1e-6)
    assert (error < 0.04) if width == 1 else (error > 0.4)


def test_where_the_models_disagree():
    comparison = compare_models(train_gaussians(tilt=0.5), simulate(200))
    found = comparison.disagreement_by_feature()
    # tilt x_0 / sigma is the distance between the models.
    assert list(found)[0] == "|x[0] - median|"
    assert found["|x[0] - median|"] > 0.9
    assert "x[1]" not in found
    nothing = compare_models(train_gaussians(), simulate(200))
    assert len(nothing.disagreement_by_feature()) <= 1


def test_where_the_models_disagree_with_outputs_that_are_missing():
    comparison = compare_models(train_gaussians(tilt=0.5), simulate(200))
    x = torch.cat((comparison.x, torch.full((200, 1), math.nan)), 1)
    x[::3, 0] = math.nan
    found = dataclasses.replace(comparison, x=x).disagreement_by_feature()
    whole = ~x[:, 0].isnan()
    distance = (x[whole, 0] - x[whole, 0].median()).abs()
    ranks = torch.stack((distance, comparison.disagreement[whole])).argsort(1)
    expected = np.corrcoef(ranks.argsort(1))[0, 1]
    assert list(found)[0] == "|x[0] - median|"
    assert found["|x[0] - median|"] == pytest.approx(expected)


def test_report_says_it_in_words():
    text = str(compare_models(train_gaussians(tilt=0.5, width=0.5), simulate(200)))
    assert "200 held-out simulations" in text
    assert "KL(p||q)" in text and "±" in text
    assert "|x[0] - median| (rank correlation +" in text
    assert "90 % regions hold" in text
    assert "no single parameter" in str(compare_models(train_gaussians()))


def test_simulations_of_the_last_training_are_used():
    inference = train_gaussians(num=200)
    proposal = inference.build_posterior().set_default_x(torch.zeros(1, 2))
    inference.append_simulations(*simulate(100), proposal=proposal)
    with pytest.raises(ValueError, match="used 200 simulations, but there are"):
        compare_models(inference)
    inference.train(learning_rate=1e-12, max_num_epochs=1, training_batch_size=50)
    comparison = compare_models(inference)
    assert len(comparison) == 30
    # Parameters of a proposal tell nothing of losses and coverage.
    assert 0 < comparison.from_prior.sum() < 30
    _, x, _ = inference.get_simulations()
    assert torch.equal(comparison.x, x[inference.val_indices])
    inference = train_gaussians(num=200)
    inference.append_simulations(*simulate(100), proposal=proposal)
    inference.train(
        discard_prior_samples=True,
        learning_rate=1e-12,
        max_num_epochs=1,
        training_batch_size=50,
    )
    comparison = compare_models(inference)
    assert len(comparison) == 10
    assert not comparison.from_prior.any()
    assert comparison.calibration_test() == (0.0, 1.0)
    assert "too few simulations from the prior" in str(comparison)
    assert check_fit(inference, torch.zeros(2), comparison).trusted


def test_appended_simulations_are_to_be_trained_on_first():
    inference = train_gaussians(num=100)
    inference.append_simulations(*simulate(50))
    said = "used 100 simulations, but there are 150 now. Train on all of them first"
    for use in (compare_models, lambda i: check_fit(i, torch.zeros(2))):
        with pytest.raises(ValueError, match=said):
            use(inference)


def test_a_round_of_equal_size_is_not_taken_for_that_trained_on():
    inference = train_gaussians(num=100)
    proposal = inference.build_posterior().set_default_x(torch.zeros(2))
    comparison = compare_models(inference)
    inference.append_simulations(*simulate(100), proposal=proposal)
    said = "used 100 simulations, but there are 200 now. Train on all of them first"
    for use in (compare_models, lambda i: check_fit(i, torch.zeros(2), comparison)):
        with pytest.raises(ValueError, match=said):
            use(inference)


def test_a_file_without_simulations_needs_others(tmp_path):
    inference = train_gaussians(num=100)
    inference.save(tmp_path / "fit.pt", simulations=False)
    held_out = simulate(20)
    # Those of another training are no stand-in.
    for loaded in (train_gaussians(num=0), train_gaussians(num=120)):
        loaded.load(tmp_path / "fit.pt")
        comparison = compare_models(loaded, held_out)
        assert len(comparison) == 20
        with pytest.raises(ValueError, match="simulations=True"):
            compare_models(loaded)
        with pytest.raises(ValueError, match="simulations=True"):
            check_fit(loaded, torch.zeros(2), comparison)


def test_held_out_simulations_that_failed_are_refused():
    # The networks of JeffreysNPE take a missing output for an average one.
    torch.manual_seed(0)
    inference = JeffreysNPE(
        PRIOR,
        posterior_nn("zuko_maf", hidden_features=5, num_transforms=1),
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(5, 1),
    )
    inference.append_simulations(*simulate(100)).train(max_num_epochs=3)
    theta, x = simulate(20)
    x[3, 1], x[5, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="x of held_out has NaN .* in 2 of 20 rows"):
        compare_models(inference, (theta, x))


def test_held_out_simulations_of_any_precision():
    inference = train_gaussians()
    theta, x = (part.double() for part in simulate(50))
    torch.manual_seed(0)
    double = compare_models(inference, (theta, x.round().long()))
    torch.manual_seed(0)
    single = compare_models(inference, (theta.float(), x.round().float()))
    assert torch.equal(double.flow_loss, single.flow_loss)
    assert torch.equal(double.disagreement, single.disagreement)


# --------------------------------------------------------------------------- verdicts


def test_verdict_on_closed_forms():
    inference = train_gaussians(shift=0.05)
    comparison = compare_models(inference, simulate(300))
    check = check_fit(inference, torch.tensor([0.5, -0.5]), comparison)
    assert check.trusted and not check.objections
    assert set(check.p_values) == {"novelty", "disagreement", "calibration"}
    assert check.level == pytest.approx(0.05 / 3)
    assert check.num_held_out == 300
    # KL of Gaussians of one width: half the squared distance.
    assert check.flow_to_proxy == pytest.approx(0.05**2 / 0.2, abs=0.02)
    assert check.proxy_to_flow == pytest.approx(0.05**2 / 0.2, abs=0.03)
    assert check.relative_ess == pytest.approx(math.exp(-(0.05**2) * 2 / 0.2), abs=0.05)
    assert str(check) == check.text
    assert check.text.startswith("Nothing speaks against the posterior")
    assert "flow and proxy agree (to 0.0" in check.text
    assert "poor witness" not in check.text
    assert "p-values: novelty" in check.text
    assert "90 % credible regions hold" in check.text


def test_a_check_is_the_same_again_and_moves_no_random_numbers():
    inference = train_gaussians(num=200)
    x_o = torch.tensor([0.5, -0.3])
    comparison = compare_models(inference)
    for given in (None, comparison):
        torch.manual_seed(7)
        np.random.seed(7)
        first = check_fit(inference, x_o, given)
        drawn = torch.rand(3), np.random.rand(3)
        assert check_fit(inference, x_o, given) == first
        torch.manual_seed(7)
        np.random.seed(7)
        assert torch.equal(drawn[0], torch.rand(3))
        assert (drawn[1] == np.random.rand(3)).all()


def test_a_large_difference_is_no_agreement_where_it_is_the_same_everywhere():
    inference = train_gaussians(proxy_width=2.0)  # at all observations
    comparison = compare_models(inference, simulate(300))
    check = check_fit(inference, torch.tensor([0.5, -0.5]), comparison, 0.01)
    # In two dimensions the two divergences sum to w^2 + 1 / w^2 - 2.
    found = check.flow_to_proxy + check.proxy_to_flow
    assert found == pytest.approx(2.25, abs=0.5)
    assert check.trusted
    assert "flow and proxy agree" not in check.text
    typical = comparison.disagreement.median()
    assert (
        "differ no more than at other simulations "
        f"(by {found:.2g} nats; {typical:.2g} at the median simulation)." in check.text
    )
    assert f"differs from the flow by {typical:.2g} nats" in check.text


def test_disagreement_is_found_where_nothing_else_is():
    # The flow is wrong for large x_0 only, which are rare and yet simulated.
    inference = train_gaussians(tilt=0.3)
    comparison = compare_models(inference, simulate(300))
    check = check_fit(inference, torch.tensor([3.2, 0.0]), comparison, 0.1)
    assert check.p_values["disagreement"] < 0.02
    assert "disagreement" in check.objections
    assert "flow and proxy disagree by" in check.text
    assert check_fit(inference, torch.tensor([0.1, 0.0]), comparison).trusted


def test_small_disagreements_are_no_cause_for_distrust():
    inference = train_gaussians(tilt=0.02)
    comparison = compare_models(inference, simulate(300))
    check = check_fit(inference, torch.tensor([2.7, 0.0]), comparison, 0.2)
    assert check.flow_to_proxy + check.proxy_to_flow < 0.1
    assert "disagreement" not in check.objections


def test_overconfidence_is_found():
    inference = train_gaussians(width=0.5)
    # 90 % regions hold 1 - 0.1 ** 0.25, or 44 %; the standard error is 1.6 %.
    comparison = compare_models(inference, simulate(1000))
    check = check_fit(inference, torch.zeros(2), comparison)
    assert not check.trusted
    assert check.objections == ("calibration",)
    assert check.coverage_error > 0.3
    assert "Do not trust the posterior" in check.text
    assert "90 % credible regions hold 4" in check.text


def test_too_few_held_out_simulations_are_said():
    inference = train_gaussians(num=200)
    check = check_fit(inference, torch.zeros(2))
    assert check.num_held_out == 20
    assert "Too few held-out simulations (20)" in check.text
    assert "59 are needed" in check.text


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda i: check_fit(i, torch.zeros(3, 2)),
            "One observation is expected, got 3",
        ),
        (
            lambda i: check_fit(i, torch.zeros(2), false_alarm_rate=5),
            "false_alarm_rate must be between 0 and 1, got 5",
        ),
        (lambda i: check_fit(i, torch.tensor([0.0, math.nan])), "(?i)nan"),
        (
            lambda i: compare_models(i, (torch.zeros(3, 2), torch.zeros(4, 2))),
            "as many parameters as outputs, got 3 and 4",
        ),
        (
            lambda i: compare_models(i, (torch.zeros(0, 2), torch.zeros(0, 2))),
            "no held-out simulations",
        ),
        (
            lambda i: compare_models(i, simulate(3), num_samples=0),
            "num_samples must be at least 1, got 0",
        ),
        (
            lambda i: check_fit(i, torch.zeros(2), num_samples=-5),
            "num_samples must be at least 1, got -5",
        ),
        (
            lambda i: compare_models(i, (torch.zeros(3, 2) / 0, torch.zeros(3, 2))),
            "theta of held_out has NaN or infinity in 3 of 3 rows",
        ),
        (
            lambda i: check_fit(
                JeffreysNPE(PRIOR, tracker=NoTracker()), torch.zeros(2)
            ),
            r"call .train\(\) first",
        ),
    ],
)
def test_errors(use, message):
    with pytest.raises(ValueError, match=message):
        use(train_gaussians(num=100))


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (
            lambda i: check_fit(i.build_posterior(), torch.zeros(2)),
            TypeError,
            "the JeffreysNPE that was trained.* got DirectPosterior",
        ),
        (
            lambda i: compare_models(NPE(PRIOR, tracker=NoTracker())),
            TypeError,
            "the JeffreysNPE that was trained.* got NPE",
        ),
        (
            lambda i: check_fit(i, torch.zeros(2), simulate(10)),
            TypeError,
            "comparison must be what compare_models returned, got tuple",
        ),
        (
            lambda i: compare_models(i, (torch.zeros(3, 2),)),
            TypeError,
            r"\(theta, x\); got \(Tensor\)",
        ),
        (
            lambda i: compare_models(i, torch.zeros(2, 2)),
            TypeError,
            r"\(theta, x\); got \(Tensor\)",
        ),
        (
            lambda i: compare_models(i, (torch.zeros(3, 1), torch.zeros(3, 2))),
            ValueError,
            r"shapes \('num', 2\) and \('num', 2\), got \(3, 1\) and \(3, 2\)",
        ),
        (
            lambda i: compare_models(i, (torch.zeros(3, 2), torch.zeros(3, 2, 2))),
            ValueError,
            r"got \(3, 2\) and \(3, 2, 2\)",
        ),
    ],
)
def test_objects_of_another_kind(use, error, message):
    with pytest.raises(error, match=message):
        use(train_gaussians(num=100))


# ---------------------------------------------------------------------------- novelty


def pad(trials):
    """Leave a random number of the trials, one or more, and put NaN for the others."""
    num = torch.randint(1, trials.shape[1] + 1, (len(trials), 1))
    padded = torch.arange(trials.shape[1]) >= num
    return trials.masked_fill(padded.unsqueeze(-1), torch.nan)


def half_missing(x):
    """Put NaN for the first column of every other row, of all but the last one."""
    x = torch.cat((x[:, :1], x), 1)
    x[1::2, 0] = torch.nan
    return x


@pytest.mark.parametrize(
    "kind", ["plain", "curved", "wide", "reference", "padded", "whole"]
)
def test_p_values_of_novelty_are_uniform(kind):
    # An observation from the simulator: P(p <= a) = a for every a, in finite samples,
    # also with more features than simulations.
    p_values = []
    for _ in range(300):
        x = torch.randn(60, 2) ** (3 if kind == "curved" else 1)
        if kind == "curved":
            x = torch.cat((x, x[:, :1] ** 2, x.prod(1, keepdim=True)), 1)
        if kind == "wide":
            x = x @ torch.randn(2, 80) + 0.1 * torch.randn(60, 80)
        if kind == "padded":
            x = pad(x.unsqueeze(1) + torch.randn(60, 4, 2))
        if kind == "whole":  # an observation of all trials, as half of the simulations
            x = (torch.randn(200, 1, 2) + torch.randn(200, 4, 2)).flatten(1)
            x[:100] = pad(x[:100].reshape(100, 4, 2)).flatten(1)
        if kind == "reference":
            p_values.append(_novelty(x[:30], x[30:]))
        else:
            p_values.append(_novelty(x))
    p_values = torch.tensor(p_values)
    for level in (0.05, 0.1, 0.3, 0.7):
        error = (level * (1 - level) / 300) ** 0.5
        # Of n simulations p is a multiple of 1 / n: at most 1 / 30 to either side.
        share = (p_values <= level + 1e-6).double().mean().item()
        assert level - 1 / 30 - 3.5 * error < share < level + 3.5 * error


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x,
        lambda x: torch.cat((x, x[:, :1]), 1),  # a column twice
        lambda x: torch.cat((x, torch.full((len(x), 1), 3.0)), 1),  # a constant one
        lambda x: x * torch.tensor([1e-6, 1.0, 1e6]),
        lambda x: torch.cat((x[:20] * 1e8, x[20:])),  # outliers
        lambda x: x.reshape(-1, 1, 3).expand(-1, 40, 3).clone(),  # images
        lambda x: torch.cat((x, torch.full((len(x), 1), torch.nan)), 1),
        half_missing,
    ],
)
def test_novelty_is_found_in_spite_of(spoil):
    x = torch.randn(300, 3)
    x[:, 2] = x[:, 0] + x[:, 1] + 0.1 * torch.randn(300)
    good, bad = torch.tensor([[0.3, -0.4, -0.1], [0.3, -0.4, 1.5]])  # off its plane
    far = torch.tensor([30.0, 0.0, 30.0])
    for x_o, is_novel in ((good, False), (bad, True), (far, True)):
        p_value = _novelty(spoil(torch.cat((x, x_o.unsqueeze(0)))))
        if len(spoil(x)) and (spoil(x).abs() > 1e6).any() and is_novel:
            assert p_value < 0.1  # after twenty outliers of 300
        else:
            assert (p_value < 0.02) if is_novel else (p_value > 0.05)


def test_a_feature_that_never_varied():
    x = torch.cat((torch.randn(200, 2), torch.full((200, 1), 7.0)), 1)
    x_o = torch.tensor([[0.1, 0.1, 7.0], [0.1, 0.1, 7.5]])
    assert _novelty(torch.cat((x, x_o[:1]))) > 0.05
    assert _novelty(torch.cat((x, x_o[1:]))) == pytest.approx(1 / 201)


def test_what_is_missing_is_new_where_it_never_was():
    whole, padded = torch.randn(200, 3), torch.randn(200, 3)
    padded[:, 2] = torch.nan
    complete, incomplete = torch.tensor([[0.1, 0.1, 0.0], [0.1, 0.1, torch.nan]])
    for x, usual, new in (
        (whole, complete, incomplete),
        (padded, incomplete, complete + torch.tensor([0.0, 0.0, 0.1])),
    ):
        assert _novelty(torch.cat((x, usual[None]))) > 0.05
        assert _novelty(torch.cat((x, new[None]))) == pytest.approx(1 / 201)
        assert _novelty(torch.cat((x[:50], new[None])), x[50:]) == pytest.approx(1 / 51)


# ------------------------------------------------------------------- rates of the alarm

BOX = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
MIXING = torch.tensor([
    [1.0, 0.0, 1.0, 1.0, 0.5, 0.0, 0.7, -0.3],
    [0, 1.0, 1.0, -1.0, 0, 0.5, 0.7, 0.9],
])
NUM_CASES = 60


def sensors(theta, noise=0.3):
    """Eight sensors that see two parameters, each in its own way."""
    return theta @ MIXING + noise * torch.randn(len(theta), 8)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    theta = BOX.sample((800,))
    inference = JeffreysNPE(
        BOX,
        posterior_nn("zuko_maf", hidden_features=20, num_transforms=2),
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(20, 1),
    )
    inference.append_simulations(theta, sensors(theta))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.train(max_num_epochs=120, learning_rate=5e-3, training_batch_size=100)
    return inference, compare_models(inference)


@pytest.mark.parametrize(
    ("simulator", "parameters", "flagged", "by"),
    [
        # The rates that count: at least 0.9 of the bad, at most 0.1 of the good.
        (sensors, BOX, (0.0, 0.1), None),
        (lambda theta: sensors(theta, 1.2), BOX, (0.9, 1.0), "novelty"),
        (lambda theta: sensors(theta) + torch.tensor([0, 2.0] * 4), BOX, (0.9, 1), ""),
        (lambda theta: 2 * sensors(theta) + 1, BOX, (0.9, 1.0), "novelty"),
        (
            sensors,
            BoxUniform(torch.full((2,), 3.5), torch.full((2,), 8.0)),
            (0.9, 1.0),
            "novelty",
        ),
        (lambda theta: sensors(theta) + 20, BOX, (0.9, 1.0), "novelty"),
    ],
    ids=["good", "noise", "offset", "units", "far parameters", "far"],
)
def test_rates_of_the_alarm(trained, simulator, parameters, flagged, by):
    inference, comparison = trained
    x = simulator(parameters.sample((NUM_CASES,)))
    checks = [check_fit(inference, x_o, comparison) for x_o in x]
    rate = sum(not check.trusted for check in checks) / NUM_CASES
    assert flagged[0] <= rate <= flagged[1]
    if by:
        assert sum(by in check.objections for check in checks) > 0.8 * NUM_CASES


def test_every_alarm_has_its_share(trained):
    inference, comparison = trained
    torch.manual_seed(5)
    x = sensors(BOX.sample((150,)))
    checks = [check_fit(inference, x_o, comparison, 0.3) for x_o in x]
    for name in ("novelty", "disagreement"):
        share = sum(check.p_values[name] <= 0.1 for check in checks) / 150
        # Of the held-out simulations' own luck, too: 80 of them.
        assert share < 0.1 + 3.5 * (0.09 / 150 + 0.09 / 80) ** 0.5


def test_embedding_is_tested_as_well():
    torch.manual_seed(0)
    theta = BOX.sample((500,))
    embedding = FCEmbedding(8, output_dim=12, num_hiddens=20)
    inference = JeffreysNPE(
        BOX,
        posterior_nn(
            "zuko_maf", hidden_features=10, num_transforms=1, embedding_net=embedding
        ),
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(10, 1, embedding_net=embedding),
    )
    inference.append_simulations(theta, sensors(theta))
    inference.train(
        max_num_epochs=5,
        learning_rate=5e-3,
        validation_fraction=0.4,
        training_batch_size=50,
    )
    comparison = compare_models(inference)
    far = check_fit(inference, sensors(torch.full((1, 2), 9.0)), comparison)
    assert set(far.p_values) == {"novelty", "embedding", "disagreement", "calibration"}
    assert far.level == pytest.approx(0.05 / 4)
    assert {"novelty", "embedding"} <= set(far.objections)
    assert "embedding of the observation is unlike" in far.text
    checks = [check_fit(inference, x, comparison) for x in sensors(BOX.sample((40,)))]
    share = sum(check.p_values["embedding"] <= 0.1 for check in checks) / 40
    assert share < 0.1 + 3.5 * (0.09 / 40 + 0.09 / 200) ** 0.5


def test_trials_of_unequal_number():
    # As sbi documents them: padded with NaN, which the embedding leaves out.
    def whole_trials(theta):
        return theta.unsqueeze(1) + torch.randn(len(theta), 3, 2)

    torch.manual_seed(0)
    theta = BOX.sample((400,))
    embedding = PermutationInvariantEmbedding(
        FCEmbedding(2, output_dim=6, num_hiddens=10, num_layers=1),
        trial_net_output_dim=6,
        num_hiddens=10,
        output_dim=6,
    )
    inference = JeffreysNPE(
        BOX,
        posterior_nn(
            "zuko_maf",
            hidden_features=10,
            num_transforms=1,
            embedding_net=embedding,
            z_score_x="none",
        ),
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(10, 1, embedding_net=embedding, z_score_x="none"),
    )
    x = pad(whole_trials(theta))
    assert x.isnan().any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.append_simulations(theta, x, exclude_invalid_x=False)
    inference.train(max_num_epochs=4, learning_rate=5e-3, validation_fraction=0.4)
    comparison = compare_models(inference)
    # sbi refuses observations that are not whole.
    far = check_fit(inference, whole_trials(torch.full((1, 2), 30.0)), comparison)
    assert {"novelty", "embedding"} <= set(far.objections)
    # Held-out simulations that are whole as well are the observations' equals.
    held_out = BOX.sample((160,))
    comparison = compare_models(inference, held_out=(held_out, whole_trials(held_out)))
    observations = whole_trials(BOX.sample((40,)))
    checks = [check_fit(inference, x_o, comparison) for x_o in observations]
    for name, num in (("novelty", 400), ("embedding", 160)):
        share = sum(check.p_values[name] <= 0.1 for check in checks) / 40
        assert share < 0.1 + 3.5 * (0.09 / 40 + 0.09 / num) ** 0.5
