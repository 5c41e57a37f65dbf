r"""Scale on which an output is a smooth function of the parameters, and noise.

A surrogate of the likelihood says where an output lies, and how far from there, as
functions of the parameters. On the scale of a mean with Gaussian noise that is little
to learn; on another one the same noise is skewed, and its spread and shape depend on
where it is. Noise that multiplies is of the opposite kind. As Box and Cox [1] choose
the power of a response, so is chosen here, for every output, between its standard and
its normal score: by the likelihood of

.. math:: y_k = m_k(\theta) + s_k(\theta)\, \epsilon, \qquad \epsilon \sim t_\nu

with response surfaces [2] of second order for $m_k$ and $\log s_k^2$. Each half of the
simulations is judged by scores and surfaces of the other one, and the slope of a score
makes both densities of the same output.

[1] G. E. P. Box and D. R. Cox, "An Analysis of Transformations", Journal of the Royal
Statistical Society B 26, 1964.
[2] G. E. P. Box and K. B. Wilson, "On the Experimental Attainment of Optimum
Conditions", Journal of the Royal Statistical Society B 13, 1951.
"""

from typing import Any, Tuple

import numpy as np
import torch
from scipy import stats
from scipy.special import digamma
from sklearn.linear_model import RidgeCV
from torch import Tensor

from sbi_jeffreys.features import normal_score_table
from sbi_jeffreys.response_surface import second_order_terms

# Simulations that are enough to tell, and that are too few.
MAX_SIMULATIONS = 2_000
MIN_SIMULATIONS = 40
# Ridge penalties among which leave-one-out errors choose, for every output alone.
PENALTIES = np.logspace(-2, 5, 15)
# Heavier tails than a Gaussian's: one outlier is no evidence against a scale.
DEGREES_OF_FREEDOM = 8.0
# Mean of the logarithm of squares of Student's t.
MEAN_LOG_SQUARE = (
    digamma(0.5) - digamma(DEGREES_OF_FREEDOM / 2) + np.log(DEGREES_OF_FREEDOM)
)
# Squares of residuals of scores below which there is no noise.
MIN_SQUARE = 1e-8


def prefers_normal_scores(z: Tensor, x: Tensor) -> Tensor:
    r"""Return for which outputs normal scores are the better scale.

    Args:
        z: Standardised parameters of shape `(num_simulations, num_parameters)`.
        x: Outputs with many values each, of shape `(num_simulations, num_outputs)`.
            Those that are missing (NaN or infinite) are not judged.

    Returns:
        Booleans of shape `(num_outputs,)`, false of fewer than forty simulations.
    """
    z, x = z[:MAX_SIMULATIONS], x[:MAX_SIMULATIONS]
    num, num_outputs = x.shape
    if num < MIN_SIMULATIONS or num_outputs == 0:
        return torch.zeros(num_outputs, dtype=torch.bool, device=x.device)
    terms = second_order_terms(z).double().cpu().numpy()
    outputs = x.double().cpu().numpy()
    outputs = np.where(np.isfinite(outputs), outputs, np.nan)
    first = np.arange(num) < num // 2
    gain = _gain(terms, outputs, first) + _gain(terms, outputs, ~first)
    return torch.from_numpy(gain > 0).to(x.device)


def _gain(terms: np.ndarray, outputs: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Return the log likelihood that normal scores gain over standard ones.

    Args:
        terms: Of the response surfaces, `(num_simulations, num_terms)`.
        outputs: Of shape `(num_simulations, num_outputs)`.
        fitted: Whether a simulation is fitted to; if not, it is judged.

    Returns:
        Of shape `(num_outputs,)`.
    """
    columns = [_scores(column, fitted) for column in outputs.T]
    scores = np.stack([scores for scores, _ in columns], 1)
    log_slopes = np.stack([log_slopes for _, log_slopes in columns], 1)
    num, num_outputs, num_scales = scores.shape
    # A missing output has the score of the average, as the networks see it.
    y = np.nan_to_num(scores).reshape(num, -1)
    mean, squares = _surface(terms[fitted], y[fitted])
    log_squares, _ = _surface(terms[fitted], np.log(squares + MIN_SQUARE))
    judged = terms[~fitted]
    scale = np.exp((log_squares.predict(judged) - MEAN_LOG_SQUARE) / 2)
    log_density = stats.t.logpdf(
        y[~fitted], DEGREES_OF_FREEDOM, mean.predict(judged), scale
    ).reshape(-1, num_outputs, num_scales)
    standard, normal = np.moveaxis(log_density + log_slopes[~fitted], -1, 0)
    # Where the output is missing, or beyond the table of normal scores.
    known = np.isfinite(standard) & np.isfinite(normal)
    return np.where(known, normal - standard, 0.0).sum(0)


def _scores(values: np.ndarray, fitted: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return standard and normal scores of an output, and logarithms of their slopes.

    Args:
        values: The output of shape `(num_simulations,)`.
        fitted: Whether the scores are fitted to a simulation.

    Returns:
        Both of shape `(num_simulations, 2)`, NaN where it is missing. Beyond the table
        a normal score has no slope, and its logarithm is minus infinity.
    """
    known = torch.from_numpy(values[fitted & ~np.isnan(values)])
    if len(known.unique()) < 2:
        unknown = np.full((len(values), 2), np.nan)
        return unknown, unknown
    center, scale = known.mean().item(), known.std(correction=0).item()
    knots, at_knots = (t.numpy() for t in normal_score_table(known))
    knots, index = np.unique(knots, return_index=True)  # they coincide at the ends
    slopes = np.diff(at_knots[index]) / np.diff(knots)
    with np.errstate(divide="ignore"):
        segment = np.searchsorted(knots, values, side="right") - 1
        inside = (segment >= 0) & (segment < len(slopes))
        slope = np.where(inside, slopes[np.clip(segment, 0, len(slopes) - 1)], 0.0)
        log_slope = np.log(slope)
    normal = np.interp(values, knots, at_knots[index])
    standard = (values - center) / scale
    return (
        np.stack((standard, normal), 1),
        np.stack((np.full_like(standard, -np.log(scale)), log_slope), 1),
    )


def _surface(terms: np.ndarray, y: np.ndarray) -> Tuple[Any, np.ndarray]:
    """Return response surfaces of scores, and squares of their leave-one-out errors."""
    penalties = PENALTIES * len(y) / 1000
    surface = RidgeCV(penalties, alpha_per_target=True, store_cv_results=True)
    surface.fit(terms, y)
    errors = surface.cv_results_
    best = errors.mean(0).argmin(-1)
    return surface, np.take_along_axis(errors, best[None, :, None], 2)[..., 0]
