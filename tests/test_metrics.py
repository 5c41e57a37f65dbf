"""The two-sample tests against scikit-learn, closed forms, autograd and torch.optim."""

import math

import numpy as np
import pytest
import torch
from sbi.inference import NLE, NPE
from sbi.utils import BoxUniform
from sbi.utils.metrics import unbiased_mmd_squared
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.functional import binary_cross_entropy_with_logits

from sbi_jeffreys import _batched_mlp as mlp
from sbi_jeffreys.metrics import (
    c2st,
    c2st_many,
    log_prob_true_parameters,
    marginal_c2st,
    mmd,
    sliced_wasserstein,
)


def normal(num: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(num, dim, generator=generator)
    samples[:, 0] += shift
    return samples


def classifier(dim: int, seed: int) -> MLPClassifier:
    return MLPClassifier((10 * dim, 10 * dim), max_iter=10_000, random_state=seed)


def scikit_learn_c2st(x: Tensor, y: Tensor, seed: int = 1) -> float:
    mean, std = x.mean(0), x.std(0)
    data = torch.cat(((x - mean) / std, (y - mean) / std)).numpy()
    label = np.repeat([0, 1], [len(x), len(y)])
    folds = KFold(5, shuffle=True, random_state=seed)
    model = classifier(x.shape[1], seed)
    return cross_val_score(model, data, label, cv=folds).mean()


def networks(num: int, dim: int, hidden: int, seed: int = 0) -> mlp.BatchedMLP:
    """Different networks, in double precision."""
    draws = [
        mlp.initial_parameters(dim, hidden, np.random.RandomState(seed + i))
        for i in range(num)
    ]
    return mlp.BatchedMLP([torch.cat(p).double() for p in zip(*draws, strict=True)])


def objective(parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The sum over the networks of what `BatchedMLP.backward` is the gradient of."""
    w1, b1, w2, b2, w3, b3 = parameters
    h = torch.relu(torch.relu(x @ w1 + b1) @ w2 + b2)
    logit = (h @ w3.transpose(1, 2) + b3).squeeze(-1)
    loss = binary_cross_entropy_with_logits(logit, y, reduction="none").mean(1).sum()
    squared = sum(w.square().sum() for w in (w1, w2, w3))
    return loss + 0.5 * mlp.PENALTY * squared / x.shape[1]


class TestBatchedMLP:
    def test_gradients_are_those_of_autograd(self):
        nets = networks(3, 2, 7)
        x = normal(33, 2, 1).double().expand(3, -1, -1)
        y = (torch.arange(33) % 2).double().expand(3, -1)
        residual = nets.forward(x) - y.unsqueeze(1)
        nets.backward(x, residual)
        leaves = [p.clone().requires_grad_() for p in nets.parameters]
        expected = torch.autograd.grad(objective(leaves, x, y), leaves)
        for found, gradient in zip(nets.gradients, expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-15)

    def test_steps_are_those_of_adam(self):
        nets = networks(2, 3, 5)
        leaves = [p.clone().requires_grad_() for p in nets.parameters]
        adam = torch.optim.Adam(leaves, lr=mlp.LEARNING_RATE)
        y = (torch.arange(40) % 2).double().expand(2, -1)
        for step in range(5):
            # scikit-learn adds epsilon before the bias correction, torch after it.
            correction = math.sqrt(1.0 - mlp.BETA_2 ** (step + 1))
            adam.param_groups[0]["eps"] = mlp.EPSILON / correction
            x = normal(40, 3, step).double().expand(2, -1, -1)
            nets.backward(x, nets.forward(x) - y.unsqueeze(1))
            nets.adam_step()
            adam.zero_grad()
            objective(leaves, x, y).backward()
            adam.step()
        for found, expected in zip(nets.parameters, leaves, strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)

    def test_select_keeps_parameters_and_moments(self):
        nets, one = networks(3, 2, 5), networks(1, 2, 5, seed=2)
        y = (torch.arange(20) % 2).double()
        for step in range(4):
            if step == 2:
                nets = nets.select(torch.tensor([2]))
            for some in (nets, one):
                x = normal(20, 2, step).double().expand(some.num_networks, -1, -1)
                some.backward(x, some.forward(x) - y)
                some.adam_step()
        for found, expected in zip(nets.parameters, one.parameters, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize("num", [150, 450])
    def test_a_training_is_scikit_learns(self, num):
        # Few epochs: rounding errors have not grown yet. 450 leaves a short last batch.
        x = normal(num, 2, 0)
        y = torch.bernoulli(torch.sigmoid(2 * x[:, 0]), generator=torch.manual_seed(0))
        model = classifier(2, 3).set_params(max_iter=20)
        with pytest.warns(UserWarning, match="Maximum iterations"):
            model.fit(x.numpy(), y.numpy())
        accuracy = mlp.train_and_score(
            x[None], y[None], x[None], y[None], hidden=20, seed=3, max_epochs=20
        )
        assert accuracy.item() == pytest.approx(model.score(x.numpy(), y.numpy()))

    def test_stops_when_scikit_learn_does(self, monkeypatch):
        running = []
        penalty = mlp.BatchedMLP.penalty

        def counted(nets: mlp.BatchedMLP) -> Tensor:
            running.append(nets.num_networks)
            return penalty(nets)

        # The penalty is asked for once an epoch.
        monkeypatch.setattr(mlp.BatchedMLP, "penalty", counted)
        x = torch.stack([normal(2000, 2, seed) for seed in range(3)])
        # From labels that say nothing to such as are nearly a function of x.
        slope = torch.tensor([[0.0], [2.0], [8.0]])
        probability = torch.sigmoid(slope * x[:, :, 0])
        y = torch.bernoulli(probability, generator=torch.manual_seed(0))
        mlp.train_and_score(x, y, x, y, hidden=20, seed=1, max_epochs=10_000)
        epochs = [sum(number > i for number in running) for i in range(3)]
        models = [
            classifier(2, 1).fit(*map(Tensor.numpy, xy))
            for xy in zip(x, y, strict=True)
        ]
        expected = sorted((model.n_iter_ for model in models), reverse=True)
        # Rounding may move a loss across the tolerance, and a stop by an epoch or two.
        assert epochs == pytest.approx(expected, abs=2)
        assert len(set(epochs)) == 3


def test_classifier_whose_loss_is_nan_stops(monkeypatch):
    losses = []
    cross_entropy = mlp.Examples.cross_entropy

    def noted(self):
        losses.append(cross_entropy(self))
        return losses[-1]

    monkeypatch.setattr(mlp.Examples, "cross_entropy", noted)
    x, y = torch.full((1, 40, 2), torch.nan), torch.arange(40.0)[None] % 2
    mlp.train_and_score(x, y, x, y, hidden=4, seed=1, max_epochs=100)
    assert len(losses) == mlp.PATIENCE + 1
    assert torch.stack(losses).isnan().all()


class TestC2ST:
    @pytest.mark.parametrize(("dim", "shift"), [(1, 0.5), (2, 0.0), (2, 1.0), (3, 3.0)])
    def test_agrees_with_scikit_learn(self, dim, shift):
        x, y = normal(400, dim, 0), normal(351, dim, 1, shift)
        # The same data, folds and initial parameters: what differs is rounding.
        assert c2st(x, y) == pytest.approx(scikit_learn_c2st(x, y), abs=0.01)

    @pytest.mark.slow
    def test_agrees_with_scikit_learn_after_long_training(self):
        # Overfitted for hundreds of epochs, both end as if their seeds were different,
        # so means over seeds are compared.
        x, y = normal(100, 3, 0), 1.3 * normal(100, 3, 1, 1.0)
        seeds = range(3)
        ours = np.array([c2st(x, y, seed=s) for s in seeds])
        sklearn = np.array([scikit_learn_c2st(x, y, seed=s) for s in seeds])
        error = math.sqrt((ours.var() + sklearn.var()) / (len(seeds) - 1))
        assert abs(ours.mean() - sklearn.mean()) < 3 * error

    @pytest.mark.parametrize("shift", [0.5, 1.5, 3.0])
    def test_shifted_normals_reach_the_best_accuracy(self, shift):
        x, y = normal(2000, 2, 0), normal(2000, 2, 1, shift)
        best = 0.5 * (1.0 + math.erf(shift / math.sqrt(8.0)))
        error = math.sqrt(best * (1 - best) / 4000)
        # A trained classifier is below the best one, here by less than 0.01.
        assert best - 0.01 - 3 * error < c2st(x, y) < best + 3 * error

    @pytest.mark.parametrize("dim", [1, 2, 4])
    def test_same_distribution_gives_a_half(self, dim):
        accuracy = c2st(normal(1000, dim, 0), normal(1000, dim, 1))
        assert abs(accuracy - 0.5) < 3 * 0.5 / math.sqrt(2000)

    def test_disjoint_samples_give_one(self):
        assert c2st(normal(200, 2, 0), normal(200, 2, 1, 20.0)) == 1.0

    def test_sees_what_the_marginals_hide(self):
        # Uniform on the square, and on two of its quarters: equal marginals.
        x = torch.rand(1500, 2, generator=torch.manual_seed(0)) - 0.5
        y = torch.rand(1500, 2, generator=torch.manual_seed(1)) - 0.5
        y[:, 1] = y[:, 1].abs() * y[:, 0].sign()
        # A third of the samples lie where y has none, and are told with certainty.
        assert c2st(x, y) == pytest.approx(0.75, abs=0.04)
        error = 0.5 / math.sqrt(3000)
        assert ((marginal_c2st(x, y) - 0.5).abs() < 3.5 * error).all()

    def test_seed_and_folds_matter_and_repeat(self):
        x, y = normal(300, 2, 0), normal(300, 2, 1, 1.0)
        assert c2st(x, y) == c2st(x, y)
        assert c2st(x, y) != c2st(x, y, seed=2)
        assert c2st(x, y) != c2st(x, y, n_folds=4)

    def test_z_score_is_by_the_first_sample(self):
        x, y = 3.0 + 2.0 * normal(300, 2, 0), normal(300, 2, 1, 1.0)
        mean, std = x.mean(0), x.std(0)
        by_hand = c2st((x - mean) / std, (y - mean) / std, z_score=False)
        assert c2st(x, y) == by_hand
        assert c2st(y, x) != by_hand != c2st(x, y, z_score=False)

    def test_leaves_its_input_as_it_was(self):
        x, y = normal(100, 2, 0).double(), normal(100, 2, 1).requires_grad_()
        copies = x.clone(), y.detach().clone()
        assert c2st(x, y, device=torch.device("cpu")) == c2st(x, y.detach())
        assert torch.equal(x, copies[0]) and torch.equal(y.detach(), copies[1])

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_gpu_agrees_with_cpu(self):
        x, y = normal(2000, 2, 0), normal(2000, 2, 1, 1.0)
        assert c2st(x, y, device="cuda") == pytest.approx(c2st(x, y), abs=0.01)
        assert c2st(x.cuda(), y.cuda()) == c2st(x, y)


class TestC2STMany:
    def test_is_c2st_of_each_pair(self):
        # Of different shapes; 121 + 100 samples do not divide into five equal folds.
        pairs = [
            (normal(121, 2, 0), normal(100, 2, 1)),
            (normal(200, 3, 2), normal(150, 3, 3, 1.0)),
            (normal(121, 2, 4), normal(100, 2, 5, 2.0)),
            (normal(100, 2, 6), normal(121, 2, 7, 0.5)),
        ]
        together = c2st_many(pairs, seed=3)
        # The networks are the same but for rounding, which depends on where in memory
        # their parameters lie and which a training of hundreds of epochs makes grow.
        one_by_one = [c2st(*pair, seed=3) for pair in pairs]
        assert together.tolist() == pytest.approx(one_by_one, abs=0.02)

    def test_does_not_depend_on_the_number_of_threads(self):
        pairs = [(normal(150, 2, i), normal(150, 2, 50 + i, 1.0)) for i in range(4)]
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = c2st_many(pairs)
            torch.set_num_threads(3)
            three = c2st_many(pairs)
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(threads)
        assert one.tolist() == pytest.approx(three.tolist(), abs=0.02)

    def test_no_pairs(self):
        assert c2st_many([]).shape == (0,)

    def test_error_names_the_pair(self):
        good = normal(50, 2, 0)
        with pytest.raises(ValueError, match="y of pair 1 has NaN or infinity in 1 of"):
            bad = good.clone()
            bad[7, 1] = math.nan
            c2st_many([(good, good), (good, bad)])


def test_marginal_c2st_is_c2st_of_each_column():
    x, y = normal(300, 3, 0), normal(300, 3, 1, 1.0)
    expected = [c2st(x[:, [i]], y[:, [i]]) for i in range(3)]
    assert marginal_c2st(x, y).tolist() == pytest.approx(expected, abs=0.01)
    assert expected[0] > 0.62 > max(expected[1:])


@pytest.mark.parametrize(
    "function", [c2st, marginal_c2st, mmd, sliced_wasserstein], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(50), torch.zeros(50, 1), r"x must have shape .* got \(50,\)"),
        (torch.zeros(50, 0), torch.zeros(50, 0), r"x must have shape .* got \(50, 0\)"),
        (normal(50, 2, 0), normal(50, 3, 0), "same number of columns, got 2 and 3"),
        (normal(50, 2, 0), normal(1, 2, 0), "y must have at least two samples, got 1"),
        (normal(50, 2, 0) / 0.0, normal(50, 2, 0), "x has NaN or infinity in 50 of 50"),
    ],
)
def test_bad_samples(function, x, y, message):
    with pytest.raises(ValueError, match=message):
        function(x, y)


def test_bad_types():
    with pytest.raises(TypeError, match="y must be a torch.Tensor, got ndarray"):
        c2st(normal(50, 2, 0), normal(50, 2, 0).numpy())  # pyright: ignore


@pytest.mark.parametrize("function", [c2st, mmd, sliced_wasserstein])
def test_whole_numbers(function):
    with pytest.raises(TypeError, match="x must hold .* got torch.int64. Pass x.float"):
        function(torch.arange(50)[:, None], normal(50, 1, 0))


@pytest.mark.parametrize("function", [mmd, sliced_wasserstein])
def test_precision_and_gradient_of_the_input_do_not_matter(function):
    x, y = normal(50, 2, 0), normal(40, 2, 1)
    assert function(x.double(), y.requires_grad_()) == function(x, y.detach())


@pytest.mark.parametrize(
    ("unit", "offset"), [(1e30, 0.0), (1e-30, 0.0), (1.0, 1e9), (1.0, -1e9)]
)
def test_distances_in_any_units(unit, offset):
    x, y = normal(200, 2, 0).double(), normal(150, 2, 1, 1.0).double()
    scaled = unit * x + offset, unit * y + offset
    if offset == 0:  # of which single precision leaves no digits
        scaled = scaled[0].float(), scaled[1].float()
    # The kernel has the width of x; the distance is in the units of the parameters.
    width = torch.pdist(x).median().item()
    expected = unbiased_mmd_squared(x, y, scale=width).item()
    assert mmd(*scaled) == pytest.approx(expected, abs=1e-6)
    expected = unit * sliced_wasserstein(x, y)
    assert sliced_wasserstein(*scaled) == pytest.approx(expected, rel=1e-5)


def test_bad_folds():
    x, y = normal(4, 2, 0), normal(5, 2, 1)
    with pytest.raises(ValueError, match="5 folds need at least 10 samples, got 4 \\+"):
        c2st(x, y)
    with pytest.raises(ValueError, match="n_folds must be at least 2, got 1"):
        c2st(x, y, n_folds=1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_constant_column(value):
    x, y = normal(100, 3, 0), normal(100, 3, 1)
    x[:, 1] = value
    with pytest.raises(ValueError, match="x is constant in column 1, .* z_score=False"):
        c2st(x, y)
    y[:, 1] = value
    if value < 1:
        assert 0.0 < c2st(x, y, z_score=False) < 1.0


class TestMMD:
    def test_is_sbis_with_the_same_width(self):
        x, y = normal(90, 3, 0), normal(70, 3, 1, 1.0)
        width = torch.pdist(x).median().item()
        expected = unbiased_mmd_squared(x, y, scale=width).item()
        assert mmd(x, y) == pytest.approx(expected, abs=1e-6)

    def test_blocks(self, monkeypatch):
        x, y = normal(90, 3, 0), normal(70, 3, 1, 1.0)
        whole = mmd(x, y)
        monkeypatch.setattr("sbi_jeffreys.metrics._BLOCK", 70 * 7)
        assert mmd(x, y) == pytest.approx(whole, abs=1e-7)

    def test_closed_form_of_shifted_normals(self):
        # E k(a, b) for a - b ~ N(shift, 2) and the kernel's width s.
        shift, num = 1.0, 3000
        x, y = normal(num, 1, 0), normal(num, 1, 1, shift)
        s2 = torch.pdist(x).median().item() ** 2

        def mean(difference: float) -> float:
            spread = math.sqrt(s2 / (s2 + 2.0))
            return spread * math.exp(-(difference**2) / (2.0 * (s2 + 2.0)))

        expected = 2.0 * (mean(0.0) - mean(shift))
        # The standard error is below 2 / sqrt(n) times the kernel's spread of 0.3.
        assert mmd(x, y) == pytest.approx(expected, abs=3 * 0.6 / math.sqrt(num))

    def test_unbiased_for_equal_distributions(self):
        values = [mmd(normal(100, 2, i), normal(100, 2, 100 + i)) for i in range(50)]
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values)) < 3 * error
        assert min(values) < 0

    def test_coinciding_samples(self):
        with pytest.raises(ValueError, match="median distance within x is zero"):
            mmd(torch.ones(50, 2), normal(50, 2, 0))


class TestSlicedWasserstein:
    def test_shift(self):
        # Each projection is shifted by u · s, whose mean square is |s|² / D.
        x = normal(500, 2, 0)
        shift = torch.tensor([3.0, 4.0])
        num = 2000
        found = sliced_wasserstein(x, x + shift, num_projections=num)
        # (u · s)² = 25 cos² has the variance 625 / 8.
        error = math.sqrt(625 / 8 / num)
        assert found**2 == pytest.approx(12.5, abs=3 * error)

    def test_one_dimension_of_unequal_sizes_is_exact(self):
        # Quantile functions: 0, 1 against 0, 0.5, 3 on halves and thirds.
        x, y = torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [0.5], [0.0]])
        # Levels 0-1/3: 0, 0; 1/3-1/2: 0, 0.5; 1/2-2/3: 1, 0.5; 2/3-1: 1, 3.
        expected = math.sqrt(0.25 / 6 + 0.25 / 6 + 4.0 / 3)
        assert sliced_wasserstein(x, y) == pytest.approx(expected)
        assert sliced_wasserstein(y, x) == pytest.approx(expected)

    def test_zero_and_scale(self):
        x, y = normal(100, 3, 0), normal(150, 3, 1, 1.0)
        assert sliced_wasserstein(x, x[torch.randperm(100)]) == 0.0
        twice = sliced_wasserstein(2 * x, 2 * y)
        assert twice == pytest.approx(2 * sliced_wasserstein(x, y))

    def test_bad_number_of_projections(self):
        with pytest.raises(ValueError, match="num_projections must be positive, got 0"):
            sliced_wasserstein(normal(9, 2, 0), normal(9, 2, 1), num_projections=0)


class Gaussian:
    """The posterior of theta ~ N(0, 1), x ~ N(theta, 1), widened by a factor."""

    def __init__(self, width: float = 1.0):
        self.width = width

    def _distribution(self, x: Tensor) -> MultivariateNormal:
        covariance = 0.5 * self.width**2 * torch.eye(x.shape[-1])
        return MultivariateNormal(0.5 * x, covariance)

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        return self._distribution(x).log_prob(theta)

    def sample_batched(self, sample_shape, x, **_) -> Tensor:
        return self._distribution(x).sample(sample_shape)


class TestPosteriors:
    def test_log_prob_is_the_mean_over_the_simulations(self):
        theta = normal(500, 2, 0)
        x = theta + normal(500, 2, 1)
        # The entropy of two parameters with the variance 1/2.
        expected = -math.log(math.pi * math.e)
        found = log_prob_true_parameters(Gaussian(), theta, x)
        assert found == pytest.approx(expected, abs=3 / math.sqrt(500))
        assert found > log_prob_true_parameters(Gaussian(1.3), theta, x)
        assert found > log_prob_true_parameters(Gaussian(0.7), theta, x)

    @pytest.mark.filterwarnings("ignore:Maximum number of epochs")
    def test_log_prob_of_sbis_posteriors(self):
        torch.manual_seed(0)
        prior = BoxUniform(-torch.ones(2), torch.ones(2))
        theta = prior.sample((50,))
        x = theta + 0.1 * torch.randn(50, 2)
        npe, nle = NPE(prior, "mdn"), NLE(prior, "mdn")
        for trainer in (npe, nle):
            trainer.append_simulations(theta, x).train(max_num_epochs=1)
        direct = npe.build_posterior()
        expected = direct.log_prob_batched(theta[None, :3], x[:3]).mean().item()  # pyright: ignore
        found = log_prob_true_parameters(direct, theta[:3], x[:3])
        # The share of the flow within the prior's support is estimated by sampling.
        assert found == pytest.approx(expected, abs=0.05)
        assert math.isnan(log_prob_true_parameters(nle.build_posterior(), theta, x))

    def test_log_prob_of_rows_that_do_not_match(self):
        with pytest.raises(ValueError, match="got 3 and 2 rows"):
            log_prob_true_parameters(Gaussian(), torch.zeros(3, 2), torch.zeros(2, 2))

    def test_log_prob_of_parameters_that_are_missing(self):
        # Posteriors of sbi's take them for such as lie outside the prior's support.
        theta, x = torch.zeros(4, 2), torch.zeros(4, 2)
        theta[2, 1] = math.nan
        with pytest.raises(ValueError, match="theta has NaN or infinity in 1 of 4"):
            log_prob_true_parameters(Gaussian(), theta, x)
