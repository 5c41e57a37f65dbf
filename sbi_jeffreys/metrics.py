"""How far samples of a posterior are from samples of the reference posterior.

Between two sets of samples: `c2st` and `c2st_many` (the classifier two-sample test of
published tables, computed fast), `marginal_c2st`, `mmd` and `sliced_wasserstein`. Of a
posterior, given parameters and the data simulated from them:
`log_prob_true_parameters` and `expected_coverage`.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sbi.inference.posteriors import MCMCPosterior, RejectionPosterior
from sklearn.model_selection import KFold
from torch import Tensor

from sbi_jeffreys._batched_mlp import train_and_score
from sbi_jeffreys.coverage import Coverage, expected_coverage

__all__ = [
    "Coverage",
    "c2st",
    "c2st_many",
    "expected_coverage",
    "log_prob_true_parameters",
    "marginal_c2st",
    "mmd",
    "sliced_wasserstein",
]

# Hidden units of the classifier for each dimension, and its epochs at most.
_UNITS_PER_DIMENSION = 10
_MAX_EPOCHS = 10_000


def c2st(
    x: Tensor,
    y: Tensor,
    seed: int = 1,
    n_folds: int = 5,
    z_score: bool = True,
    device: str | torch.device = "cpu",
) -> float:
    r"""Return the accuracy of a classifier that tells two sets of samples apart.

    Zero knowledge is 0.5, certainty 1. The definition is that of the benchmark of
    Lueckmann et al. (2021), on which published tables rest, and not that of
    `sbi.utils.metrics.c2st`, whose default is a random forest: both sets are
    standardised by mean and standard deviation of `x`; perceptrons with two hidden
    layers of 10 D ReLU units are trained by Adam (batches of 200, learning rate 0.001,
    L2 penalty 0.0001) until the training loss has not fallen by 0.0001 for more than
    ten epochs, 10,000 epochs at most; the accuracies on the held-out parts of shuffled
    K-fold cross-validation are averaged.

    That is what scikit-learn's `MLPClassifier` and `cross_val_score` compute. Here all
    folds are trained together as one batched network in single precision, from the
    same initial parameters and with the same order of examples as there. The results
    differ as those of two computers do: rounding errors grow along a training, so that
    two trainings of several hundred epochs end as if their seeds were different.

    Args:
        x: Samples of the reference, shape (n, D).
        y: Samples to be compared, shape (m, D).
        seed: Seed of the folds, the initial parameters and the order of the examples.
        n_folds: Number of folds.
        z_score: Whether to standardise both by mean and standard deviation of `x`.
        device: Where to train. On the CPU, the work is spread over
            `torch.get_num_threads()` threads.

    Returns:
        Accuracy in [0, 1].

    Raises:
        TypeError: If `x` or `y` is not a tensor of floating-point numbers.
        ValueError: If shapes disagree, samples are not finite or too few for the
            folds, or a column of `x` is constant and so cannot be standardised.

    References:
        Lopez-Paz and Oquab (2017), "Revisiting Classifier Two-Sample Tests".
        Lueckmann, Boelts, Greenberg, Gonçalves and Macke (2021), "Benchmarking
        Simulation-Based Inference".
    """
    return float(c2st_many([(x, y)], seed, n_folds, z_score, device)[0])


def c2st_many(
    pairs: Sequence[tuple[Tensor, Tensor]],
    seed: int = 1,
    n_folds: int = 5,
    z_score: bool = True,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Return `c2st(x, y)` of many pairs, whose classifiers are trained together.

    In few dimensions this is several times faster than one pair after the other. The
    pairs may differ in shape; those that agree in it gain.

    Args:
        pairs: Pairs (x, y) of samples, of shapes (n, D) and (m, D).
        seed: Seed, used for each pair alike.
        n_folds: Number of folds.
        z_score: Whether to standardise each pair by mean and standard deviation of x.
        device: Where to train.

    Returns:
        Accuracies, shape (len(pairs),), on the CPU.

    Raises:
        TypeError: As `c2st`.
        ValueError: As `c2st`; the message says which pair it is about.
    """
    device = torch.device(device)
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2, got {n_folds}.")
    groups: dict[tuple[int, int], list[_Fold]] = {}
    for i, (x, y) in enumerate(pairs):
        name = f" of pair {i}" if len(pairs) > 1 else ""
        _check_samples(x, y, name)
        if len(x) + len(y) < 2 * n_folds:
            raise ValueError(
                f"{n_folds} folds need at least {2 * n_folds} samples{name}, got "
                f"{len(x)} + {len(y)}. Pass more samples or fewer folds."
            )
        x, y = x.detach().to(device), y.detach().to(device)
        if z_score:
            x, y = _standardize(x, y, name)
        data = torch.cat((x, y)).float()
        label = (torch.arange(len(data), device=device) >= len(x)).float()
        splits = KFold(n_splits=n_folds, shuffle=True, random_state=seed)
        for indices in splits.split(np.empty(len(data))):
            train, test = (torch.from_numpy(index).to(device) for index in indices)
            fold = _Fold(i, data, label, train, test)
            groups.setdefault((data.shape[1], len(train)), []).append(fold)

    def accuracies(folds: list[_Fold]) -> list[float]:
        return train_and_score(
            torch.stack([fold.data[fold.train] for fold in folds]),
            torch.stack([fold.label[fold.train] for fold in folds]),
            torch.stack([fold.data[fold.test] for fold in folds]),
            torch.stack([fold.label[fold.test] for fold in folds]),
            hidden=_UNITS_PER_DIMENSION * folds[0].data.shape[1],
            seed=seed,
            max_epochs=_MAX_EPOCHS,
        ).tolist()

    num_threads = torch.get_num_threads() if device.type == "cpu" else 1
    # The largest networks first, so that the threads end at about the same time.
    batches = [
        batch
        for shape in sorted(groups, reverse=True)
        for batch in _split(groups[shape], device, num_threads)
    ]
    total = torch.zeros(len(pairs), dtype=torch.float64)
    for batch, scores in zip(
        batches, _map(accuracies, batches, num_threads), strict=True
    ):
        for fold, accuracy in zip(batch, scores, strict=True):
            total[fold.pair] += accuracy / n_folds
    return total.float()


@dataclass(frozen=True)
class _Fold:
    """One split of one pair's samples."""

    pair: int
    data: Tensor
    label: Tensor
    train: Tensor
    test: Tensor


def _split(
    folds: list[_Fold], device: torch.device, num_threads: int
) -> list[list[_Fold]]:
    """Split folds of one shape into those whose networks are trained as one.

    On the CPU, so many that the arithmetic of a step takes several times as long as
    calling torch, and no more, so that there is work for all threads.
    """
    hidden = _UNITS_PER_DIMENSION * folds[0].data.shape[1]
    size = max(1, 30_000 // hidden**2) if device.type == "cpu" else 1_000
    size = min(size, -(-len(folds) // num_threads))
    return [folds[i : i + size] for i in range(0, len(folds), size)]


# The number of torch's threads is the process's: two calls at once would restore it in
# the wrong order.
_ONE_AT_A_TIME = threading.Lock()


def _map(function: Callable, items: list, num_threads: int) -> list:
    """Apply a function to items in threads that compute with one thread each.

    Networks this small gain little from several threads within one product, and lose
    much when another process takes a core that the others then wait for.
    """
    num_workers = min(num_threads, len(items))
    if num_workers <= 1:
        return [function(item) for item in items]
    with _ONE_AT_A_TIME, ThreadPoolExecutor(num_workers) as pool:
        torch.set_num_threads(1)
        try:
            return list(pool.map(function, items))
        finally:
            torch.set_num_threads(num_threads)


def marginal_c2st(
    x: Tensor,
    y: Tensor,
    seed: int = 1,
    n_folds: int = 5,
    z_score: bool = True,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Return the C2ST of each parameter by itself.

    Args:
        x: Samples of the reference, shape (n, D).
        y: Samples to be compared, shape (m, D).
        seed: As in `c2st`.
        n_folds: As in `c2st`.
        z_score: As in `c2st`.
        device: As in `c2st`.

    Returns:
        Accuracies, shape (D,).

    Raises:
        TypeError: As `c2st`.
        ValueError: As `c2st`.
    """
    _check_samples(x, y)
    columns = list(zip(x.split(1, dim=1), y.split(1, dim=1), strict=True))
    return c2st_many(columns, seed, n_folds, z_score, device)


def mmd(x: Tensor, y: Tensor) -> float:
    r"""Return the squared maximum mean discrepancy of two sets of samples.

    The unbiased estimate, which may be negative, with the kernel
    $k(a, b) = \exp(-\|a - b\|^2 / 2 s^2)$, where s is the median of the distances
    between different samples of `x`, as in the benchmark of Lueckmann et al. (2021).
    It is `sbi.utils.metrics.unbiased_mmd_squared(x, y, scale=s)`, in blocks: that
    function holds all n m D differences at once, four gigabytes for 10,000 samples of
    ten parameters.

    Args:
        x: Samples of the reference, shape (n, D), at least two of them different.
        y: Samples to be compared, shape (m, D).

    Returns:
        Squared discrepancy.

    Raises:
        TypeError: If `x` or `y` is not a tensor of floating-point numbers.
        ValueError: If shapes disagree, samples are not finite or fewer than two, or
            more than half of the pairs of `x` coincide.

    Reference:
        Gretton, Borgwardt, Rasch, Schölkopf and Smola (2012), "A Kernel Two-Sample
        Test".
    """
    _check_samples(x, y)
    x, y, _ = _in_units_of_x(x, y)
    within_x = torch.pdist(x)
    scale = within_x.median()
    if scale <= 0:
        raise ValueError(
            "The median distance within x is zero, which leaves the kernel without a "
            "width: most samples of x coincide. Pass samples of a continuous "
            "distribution."
        )

    def mean_kernel(distance: Tensor) -> float:
        kernel = distance.div_(scale).square_().mul_(-0.5).exp_()
        return kernel.mean(dtype=torch.float64).item()

    block = max(1, _BLOCK // len(y))
    between = sum(
        len(rows) * mean_kernel(torch.cdist(rows, y, compute_mode=_EXACT))
        for rows in x.split(block)
    )
    return mean_kernel(within_x) + mean_kernel(torch.pdist(y)) - 2.0 * between / len(x)


# Distances that `mmd` holds at once.
_BLOCK = 2**24

# By differences. The default takes them from the products of the samples, which loses
# the small distances to rounding.
_EXACT = "donot_use_mm_for_euclid_dist"


def sliced_wasserstein(
    x: Tensor, y: Tensor, num_projections: int = 200, seed: int = 1
) -> float:
    r"""Return the sliced Wasserstein-2 distance of two sets of samples.

    $$\left( \mathbb{E}_u \int_0^1 \left( F^{-1}_{u^\top x}(t) -
    F^{-1}_{u^\top y}(t) \right)^2 dt \right)^{1/2}$$

    with directions u uniform on the sphere and $F^{-1}$ the quantile functions of the
    projected samples. It is in the units of the parameters: bring parameters of
    different units to one scale before.

    Args:
        x: Samples of the reference, shape (n, D).
        y: Samples to be compared, shape (m, D).
        num_projections: Number of directions.
        seed: Seed of the directions.

    Returns:
        Distance.

    Raises:
        TypeError: If `x` or `y` is not a tensor of floating-point numbers.
        ValueError: If shapes disagree, samples are not finite or fewer than two, or
            `num_projections` is not positive.

    Reference:
        Bonneel, Rabin, Peyré and Pfister (2015), "Sliced and Radon Wasserstein
        Barycenters of Measures".
    """
    _check_samples(x, y)
    if num_projections < 1:
        raise ValueError(f"num_projections must be positive, got {num_projections}.")
    x, y, unit = _in_units_of_x(x, y)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(x.shape[1], num_projections, generator=generator)
    direction = (direction / direction.norm(dim=0)).to(x)
    # The quantile functions are constant between multiples of 1/n and 1/m. Levels are
    # counted in units of 1/(n m) to be exact.
    n, m = len(x), len(y)
    levels = torch.cat((m * torch.arange(1, n + 1), n * torch.arange(1, m + 1)))
    levels = levels.unique().to(x.device)
    width = levels.diff(prepend=levels.new_zeros(1)) / (n * m)
    quantile_x = (x @ direction).sort(dim=0).values[(levels - 1) // m]
    quantile_y = (y @ direction).sort(dim=0).values[(levels - 1) // n]
    squared = width.to(x) @ (quantile_x - quantile_y).square()
    return unit * squared.mean().sqrt().item()


def log_prob_true_parameters(posterior: Any, theta: Tensor, x: Tensor) -> float:
    r"""Return the mean log density of parameters given the data simulated from them.

    $$\frac{1}{N} \sum_i \log q(\theta_i \mid x_i), \quad
    \theta_i, x_i \sim p(\theta) \, p(x \mid \theta)$$

    Its expectation is largest for the true posterior.

    Args:
        posterior: A posterior of sbi's interface.
        theta: Parameters, shape (N, D).
        x: Data simulated from each, shape (N, *data shape).

    Returns:
        Mean log density in nats; NaN if the posterior knows its density only up to a
        constant, as those sampled by MCMC or rejection.

    Raises:
        ValueError: If `theta` and `x` differ in length, or `theta` is not finite.
    """
    if len(theta) != len(x) or len(theta) == 0:
        raise ValueError(
            f"theta and x must have one row for each simulation, got {len(theta)} and "
            f"{len(x)} rows."
        )
    bad = int((~theta.isfinite().all(dim=1)).sum())
    if bad:  # for which posteriors answer that it lies outside the prior's support
        raise ValueError(
            f"theta has NaN or infinity in {bad} of {len(theta)} rows. Leave those "
            "simulations out of theta and x."
        )
    members = getattr(posterior, "posteriors", [posterior])
    if any(isinstance(p, (MCMCPosterior, RejectionPosterior)) for p in members):
        return float("nan")
    log_prob = [
        posterior.log_prob(theta[i : i + 1], x=x[i : i + 1]).detach()
        for i in range(len(theta))
    ]
    return torch.cat(log_prob).mean().item()


def _check_samples(x: Tensor, y: Tensor, name: str = "") -> None:
    """Raise an error unless x and y are two sets of samples of the same variables."""
    for letter, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{letter}{name} must be a torch.Tensor, got {type(value).__name__}."
            )
        if not value.is_floating_point():
            raise TypeError(
                f"{letter}{name} must hold floating-point numbers, got {value.dtype}. "
                f"Pass {letter}.float()."
            )
        if value.ndim != 2 or value.shape[1] == 0:
            raise ValueError(
                f"{letter}{name} must have shape (samples, dimensions), got "
                f"{tuple(value.shape)}. Reshape a single variable to (samples, 1)."
            )
        if len(value) < 2:
            raise ValueError(
                f"{letter}{name} must have at least two samples, got {len(value)}."
            )
        bad = int((~value.isfinite().all(dim=1)).sum())
        if bad:
            raise ValueError(
                f"{letter}{name} has NaN or infinity in {bad} of {len(value)} samples. "
                "Remove them, or find out why the sampler gave them."
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x and y{name} must have the same number of columns, got "
            f"{x.shape[1]} and {y.shape[1]}."
        )


def _in_units_of_x(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return both in single precision, less the mean of x, in its largest spread.

    In units such as kilograms of a star, squares are beyond single precision, and far
    from zero it has no digits left for what samples differ by. Neither matters to
    distances.

    Returns:
        The samples and the unit that they are in.
    """
    x, y = x.detach().double(), y.detach().double()
    mean, unit = x.mean(0), x.std(0).max().item()
    unit = unit if unit > 0 else 1.0
    return ((x - mean) / unit).float(), ((y - mean) / unit).float(), unit


def _standardize(x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return both shifted and scaled by mean and standard deviation of x."""
    mean, std = x.mean(dim=0), x.std(dim=0)
    constant = (x == x[0]).all(dim=0) | (std == 0)
    if constant.any():
        columns = constant.nonzero().squeeze(1).tolist()
        raise ValueError(
            f"x{name} is constant in column {', '.join(map(str, columns))}, so it "
            "cannot be standardised. Leave such columns out, or pass z_score=False."
        )
    return (x - mean) / std, (y - mean) / std
