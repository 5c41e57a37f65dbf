r"""Features of the simulation outputs: standard and normal scores.

Outputs of simulators are often skewed or have long tails, where a z-score leaves the
bulk of the simulations within a fraction of one unit. Beside the z-score every output
therefore has its normal score, $\Phi^{-1}$ of its empirical distribution function. A
monotone function of an output loses nothing, and neither depends on its units.
"""

from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

# Knots of the piecewise linear distribution function.
NUM_KNOTS = 100
# An output with fewer values is discrete, and its normal score says nothing new.
MIN_DISTINCT = 20
# Simulations that the features are fitted to; more change nothing.
MAX_SIMULATIONS = 20_000
# An outlier is that, whether it is ten or a million standard deviations away.
MAX_SCORE = 10.0


class Features(nn.Module):
    r"""Standard scores of all outputs and normal scores of the continuous ones.

    Args:
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`.
        outputs: Indices of the outputs, flattened, that have features; all if not
            given.
    """

    outputs: Optional[Tensor]
    mean: Tensor
    scale: Tensor
    continuous: Tensor
    quantiles: Tensor
    scores: Tensor

    def __init__(self, x: Tensor, outputs: Optional[Tensor] = None) -> None:
        super().__init__()
        self.register_buffer("outputs", outputs)
        flat = self._flatten(x[:MAX_SIMULATIONS])
        # Squares of what single precision holds may be more than it holds.
        mean = flat.double().nanmean(0).nan_to_num()
        self.register_buffer("mean", mean.float())
        scale = (flat - mean).square().nanmean(0).nan_to_num().sqrt().float()
        # Constant outputs carry rounding errors only.
        floor = 1e-6 * flat.nan_to_num().abs().amax(0)
        self.register_buffer("scale", torch.where(scale > floor, scale, 1.0))
        index = is_continuous(flat).nonzero().flatten()
        self.register_buffer("continuous", index)
        table = torch.empty(2, len(index), NUM_KNOTS).to(flat)
        # Not of the standard scores: where one output is far out, those of all others
        # are the same number.
        for row, values in enumerate(flat.T[index]):
            table[0, row], table[1, row] = normal_score_table(values)
        self.register_buffer("quantiles", table[0].contiguous())
        self.register_buffer("scores", table[1].contiguous())

    @property
    def numel(self) -> int:
        """Number of features."""
        return len(self.mean) + len(self.continuous)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of shape `(batch_dim, numel)`.

        Outputs that are missing (NaN or infinite) have the score zero, the average.

        Args:
            x: Simulation outputs of shape `(batch_dim, *condition_shape)`.
        """
        flat = self._flatten(x)
        return torch.cat((self._standard(flat), self._normal(flat)), 1)

    def standard_scores(self, x: Tensor) -> Tensor:
        """Return the standard scores alone.

        Args:
            x: Simulation outputs of shape `(batch_dim, *condition_shape)`.

        Returns:
            Of shape `(batch_dim, num_outputs)`, zero where an output is missing.
        """
        return self._standard(self._flatten(x))

    def normal_scores(self, x: Tensor) -> Tensor:
        """Return the normal scores of the continuous outputs alone.

        Args:
            x: Simulation outputs of shape `(batch_dim, *condition_shape)`.

        Returns:
            Of shape `(batch_dim, num_continuous)`. Outputs that are missing (NaN or
            infinite) have the score of the average.
        """
        return self._normal(self._flatten(x))

    def from_standard_scores(self, scores: Tensor) -> Tensor:
        """Return the outputs that have these standard scores.

        Args:
            scores: Of shape `(batch_dim, num_outputs)`.
        """
        return self.mean + self.scale * scores.clamp(-MAX_SCORE, MAX_SCORE)

    def from_normal_scores(self, scores: Tensor) -> Tensor:
        """Return continuous outputs that have these normal scores.

        They are within the range of the simulations that the scores were made of.

        Args:
            scores: Of shape `(batch_dim, num_continuous)`.
        """
        drawn = np.empty(scores.shape)
        knots, table = self.scores.cpu().numpy(), self.quantiles.cpu().numpy()
        for j, column in enumerate(scores.T.cpu().numpy()):
            drawn[:, j] = np.interp(column, knots[j], table[j])
        return torch.from_numpy(drawn).to(scores)

    def _normal(self, flat: Tensor) -> Tensor:
        values = torch.where(flat.isnan(), self.mean, flat)
        values = values[:, self.continuous].T.contiguous()
        right = torch.searchsorted(self.quantiles, values).clamp(1, NUM_KNOTS - 1)
        left = right - 1
        # Differences of the largest numbers are beyond single precision.
        knots = self.quantiles.double()
        x0, x1 = knots.gather(1, left), knots.gather(1, right)
        y0, y1 = self.scores.gather(1, left), self.scores.gather(1, right)
        # Neighbouring knots coincide at the ends only, where outputs are tied.
        width = (x1 - x0).clamp_min(torch.finfo(self.quantiles.dtype).tiny)
        normal = y0 + (values - x0) * ((y1 - y0) / width)
        # The last two knots at either end coincide: beyond them the score is theirs.
        return normal.clamp(-MAX_SCORE / 2, MAX_SCORE / 2).to(self.scores).T

    def _flatten(self, x: Tensor) -> Tensor:
        flat = _finite_or_nan(x)
        return flat if self.outputs is None else flat[:, self.outputs]

    def _standard(self, flat: Tensor) -> Tensor:
        standard = ((flat - self.mean) / self.scale).nan_to_num(nan=0.0)
        return standard.clamp(-MAX_SCORE, MAX_SCORE)


def num_values(x: Tensor) -> Tensor:
    """Return how many distinct values outputs have, of shape `(num_outputs,)`.

    Args:
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`.
    """
    columns = _finite_or_nan(x[:MAX_SIMULATIONS]).T
    distinct = [len(c[~c.isnan()].unique()) for c in columns]
    return torch.tensor(distinct, dtype=torch.long, device=x.device)


def is_continuous(x: Tensor) -> Tensor:
    """Return which outputs have more than a few values, of shape `(num_outputs,)`.

    Args:
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`.
    """
    return num_values(x) >= MIN_DISTINCT


def _finite_or_nan(x: Tensor) -> Tensor:
    """Return the outputs in one dimension, with NaN where there is none."""
    flat = x.flatten(1).to(torch.float32)
    return flat.masked_fill(~flat.isfinite(), torch.nan)


def normal_score_table(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return knots and their normal scores, both of shape `(NUM_KNOTS,)`.

    Args:
        values: Of shape `(num_simulations,)`; NaN are left out.
    """
    ordered = values[~values.isnan()].sort().values
    num = len(ordered)
    # Knots at even distances of the score, so that the tails have theirs.
    normal = Normal(0.0, 1.0)
    end = normal.icdf(torch.tensor(1 - 0.5 / num, dtype=torch.float64)).item()
    levels = normal.cdf(torch.linspace(-end, end, NUM_KNOTS, dtype=torch.float64))
    index = (levels * num - 0.5).round().long().clamp(0, num - 1).to(values.device)
    knots = ordered[index]
    # Tied values share the middle of their ranks.
    first = torch.searchsorted(ordered, knots)
    last = torch.searchsorted(ordered, knots, right=True)
    scores = normal.icdf((first + last).to(values) / (2 * num))
    return knots, scores
