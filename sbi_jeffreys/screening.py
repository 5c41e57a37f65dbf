r"""Screening of the simulation outputs: which of many say anything of the parameters.

Of a hundred outputs some may depend on nothing but their own noise. To a network each
is one more direction in which to overfit, and from a thousand simulations it does. They
are found without a network, by tests of the hypothesis that an output is independent of
the parameters:

- its normal score $y_j$, and $|y_j|$, are regressed on the scores of the parameters,
  with their squares and products where there are simulations enough (F test);
- what that leaves of it, $r_j$, may belong to an output $k$ that does depend on
  parameters, as a measured noise does which $k$ contains: then $r_j r_k$ or
  $|r_j| |r_k|$ is correlated with the parameters, or their mean is not that of
  independent ones.

An output is left out if it fails all of them. The first test keeps what has any
evidence at all; a weak output is kept once there are simulations enough to see it.
"""

from typing import Optional

import torch
from scipy import stats
from torch import Tensor, nn

from sbi_jeffreys.features import MAX_SIMULATIONS, Features
from sbi_jeffreys.response_surface import SIMULATIONS_PER_TERM, second_order_terms

# So few outputs are all kept: one that says nothing costs little among them, and a
# wrong decision much.
MIN_OUTPUTS = 20
# And so are all if a larger share says something.
MAX_SHARE = 0.5
# An output is kept below this p-value of its own.
LEVEL = 0.01
# Outputs are known to depend on parameters, or on one of those that do, below this
# p-value over all of them.
FAMILY_LEVEL = 0.01
MIN_SIMULATIONS = 100


def informative_outputs(theta: Tensor, x: Tensor) -> Optional[Tensor]:
    """Return which outputs say something of the parameters, or of those that do.

    Args:
        theta: Parameters of shape `(num_simulations, num_parameters)`.
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`.

    Returns:
        Indices of the outputs, in their order; `None` if all are to be kept: twenty
        outputs or fewer, outputs of more than one dimension, more than half of them
        informative, or too few simulations to tell.
    """
    if x.ndim != 2 or x.shape[1] <= MIN_OUTPUTS:
        return None
    theta, x = theta[:MAX_SIMULATIONS], x[:MAX_SIMULATIONS]
    regressors = _regressors(_scores(theta))
    if regressors is None:
        return None
    y = _scores(x)
    num_outputs = y.shape[1]
    kept = y.std(0) > 0
    p_value = torch.minimum(
        _p_value_of_regression(y, regressors),
        _p_value_of_regression(y.abs(), regressors),
    )
    p_value = (2 * p_value).clamp_max(1.0)  # the better of two
    known = p_value < FAMILY_LEVEL / num_outputs
    if known.any():
        kept = p_value < LEVEL
    if known.any() and kept.float().mean() <= MAX_SHARE:
        kept[~kept] = _belong_to(y[:, ~kept], y[:, known], regressors)
    if kept.float().mean() > MAX_SHARE or not kept.any():
        return None
    return kept.nonzero().flatten()


def outputs_taken(networks: nn.Module) -> Optional[Tensor]:
    """Return which outputs networks take that were built here, `None` if all."""
    screened = (
        module.outputs
        for module in networks.modules()
        if isinstance(module, Features)
        and module.outputs is not None
        and len(module.outputs) > 0  # else an embedding network takes all
    )
    return next(screened, None)


class SelectOutputs(nn.Identity):
    """Embedding network that takes some of the outputs.

    An `Identity`, as sbi asks all others for their parameters.

    Args:
        outputs: Their indices.
    """

    outputs: Tensor

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("outputs", outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of shape `(batch_dim, len(outputs))`.

        Args:
            x: All outputs, of shape `(batch_dim, num_outputs)`.
        """
        return x[:, self.outputs]


def _scores(values: Tensor) -> Tensor:
    """Return normal scores, and standard scores where there are few values."""
    features = Features(values)
    scores = features(values)[:, : values.shape[1]]
    scores[:, features.continuous] = features.normal_scores(values)
    return scores.double()


def _regressors(z: Tensor) -> Optional[Tensor]:
    """Return an orthonormal basis of the regressors, `None` for too few simulations."""
    num, num_parameters = z.shape
    if num < max(MIN_SIMULATIONS, SIMULATIONS_PER_TERM * num_parameters):
        return None
    regressors = second_order_terms(z)
    # Not by QR: products of parameters with few values depend on each other.
    basis, singular_values, _ = torch.linalg.svd(
        regressors - regressors.mean(0), full_matrices=False
    )
    return basis[:, singular_values > 1e-6 * singular_values[0]]


def _p_value_of_regression(y: Tensor, regressors: Tensor) -> Tensor:
    """Return p-values of the F test that columns do not depend on the regressors."""
    y = y - y.mean(0)
    total = y.square().sum(0)
    explained = (regressors.T @ y).square().sum(0)
    num_regressors = regressors.shape[1]
    num_free = len(y) - 1 - num_regressors
    # Without noise nothing is left but rounding errors, of either sign.
    unexplained = (total - explained).maximum(1e-12 * total)
    f = (explained / num_regressors) / (unexplained / num_free)
    p_value = stats.f.sf(f.cpu().numpy(), num_regressors, num_free)
    # Of outputs that do not vary there is nothing to tell.
    return torch.from_numpy(p_value).to(y).nan_to_num(nan=1.0)


def _belong_to(others: Tensor, known: Tensor, regressors: Tensor) -> Tensor:
    """Return which outputs are not independent of known ones, given the parameters."""
    others, known = (_residuals(y, regressors) for y in (others, known))
    # In the last column the mean, which is zero if they are independent.
    ones = torch.full_like(regressors[:, :1], len(regressors) ** -0.5)
    basis = torch.cat((regressors, ones), 1)
    belongs = torch.zeros(others.shape[1], dtype=torch.bool, device=others.device)
    num_tests = 2 * others.shape[1] * known.shape[1] * basis.shape[1]
    limit = float(stats.chi2.isf(FAMILY_LEVEL / num_tests, 1))
    for column in known.T:
        for product in (
            others * column[:, None],
            _centred(others.abs()) * _centred(column.abs())[:, None],
        ):
            # Normalised by its own terms: the known output's spread may depend on the
            # parameters.
            score = (basis.T @ product).square()
            score = score / (basis.square().T @ product.square())
            belongs |= (score.nan_to_num(nan=0.0) > limit).any(0)
    return belongs


def _residuals(y: Tensor, regressors: Tensor) -> Tensor:
    y = _centred(y)
    return y - regressors @ (regressors.T @ y)


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(0)
