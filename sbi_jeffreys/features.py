r"""Features of the simulation outputs: standard and normal scores.

Outputs of simulators are often skewed or have long tails, where a z-score leaves the
bulk of the simulations within a fraction of one unit. Beside the z-score every output
therefore has its normal score, $\Phi^{-1}$ of its empirical distribution function. A
monotone function of an output loses nothing, and neither depends on its units.
"""

from typing import cast

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
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`, finite.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        flat = x[:MAX_SIMULATIONS].flatten(1).to(torch.float32)
        self.register_buffer("mean", flat.mean(0))
        std = flat.std(0) if len(flat) > 1 else torch.ones_like(flat[0])
        # Constant outputs carry rounding errors only.
        floor = 1e-6 * flat.abs().amax(0)
        self.register_buffer("scale", torch.where(std > floor, std, 1.0))
        columns = self._standard(flat).T
        continuous = [len(values.unique()) >= MIN_DISTINCT for values in columns]
        index = torch.tensor(continuous).nonzero().flatten().to(flat.device)
        self.register_buffer("continuous", index)
        table = torch.empty(2, len(index), NUM_KNOTS).to(flat)
        for row, values in enumerate(columns[index]):
            table[0, row], table[1, row] = _normal_scores(values)
        self.register_buffer("knots", table[0].contiguous())
        self.register_buffer("scores", table[1].contiguous())

    @property
    def numel(self) -> int:
        """Number of features."""
        return len(cast(Tensor, self.mean)) + len(cast(Tensor, self.continuous))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of shape `(batch_dim, numel)`.

        Args:
            x: Simulation outputs of shape `(batch_dim, *condition_shape)`.
        """
        standard = self._standard(x.flatten(1))
        values = standard[:, cast(Tensor, self.continuous)].T.contiguous()
        knots, scores = cast(Tensor, self.knots), cast(Tensor, self.scores)
        right = torch.searchsorted(knots, values).clamp(1, NUM_KNOTS - 1)
        left = right - 1
        x0, x1 = knots.gather(1, left), knots.gather(1, right)
        y0, y1 = scores.gather(1, left), scores.gather(1, right)
        # Neighbouring knots coincide at the ends only, where outputs are tied.
        width = (x1 - x0).clamp_min(torch.finfo(values.dtype).tiny)
        normal = y0 + (values - x0) * ((y1 - y0) / width)
        # Beyond the outermost knots a line goes on, but not for ever.
        normal = normal.clamp(-MAX_SCORE / 2, MAX_SCORE / 2)
        standard = standard.clamp(-MAX_SCORE, MAX_SCORE)
        return torch.cat((standard, normal.T), 1)

    def _standard(self, flat: Tensor) -> Tensor:
        return (flat - cast(Tensor, self.mean)) / cast(Tensor, self.scale)


def _normal_scores(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return knots and their normal scores, both of shape `(NUM_KNOTS,)`."""
    ordered = values.sort().values
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
