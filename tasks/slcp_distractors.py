"""SLCP distractors: SLCP hidden among data that say nothing."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tasks.slcp import SLCP
from tasks.task import ReferencePosterior

NUM_INFORMATIVE = SLCP.dim_data


class SLCPDistractors(SLCP):
    r"""The eight data of `SLCP` scattered among 92 that do not depend on parameters.

    The distractors are drawn from a mixture of twenty Student t distributions in 92
    dimensions. All data are then put into a fixed random order. The posterior is that
    of `SLCP`.

    The log likelihood is that of the informative data alone. The density of the
    distractors would add a number that does not depend on parameters; their scale
    matrices are so ill-conditioned that rounding the data changes it by hundreds.

    Reference:
        Greenberg, Nonnenmacher and Macke (2019), "Automatic Posterior Transformation
        for Likelihood-Free Inference".
    """

    name = "slcp_distractors"
    dim_data = 100
    observation_file = "observation_distractors"

    def _simulate(self, theta: Tensor) -> Tensor:
        informative = super()._simulate(theta)
        distractors = distractor_mixture().sample(len(theta))
        return torch.cat((informative, distractors), dim=1)[
            :, distractor_mixture().order
        ]

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        return super()._log_likelihood(theta, x[:, informative_columns()])

    def _reference_posterior(self, x: Tensor) -> ReferencePosterior:
        return SLCP()._reference_posterior(x[informative_columns()])


def informative_columns() -> Tensor:
    """Return where the eight informative data are among the 100, shape (8,)."""
    return distractor_mixture().order.argsort()[:NUM_INFORMATIVE]


class DistractorMixture:
    """The distractors' distribution: Student t distributions with equal weights.

    Its constants are those of the published task: the first numbers of numpy's legacy
    generator, whose stream is frozen, with the seed 42.

    Attributes:
        loc: Locations, shape (20, 92).
        scale_tril: Lower triangular scale matrices, shape (20, 92, 92).
        order: Order of the data, shape (100,): datum i is the one that was at place
            `order[i]` when the informative data still came first.
    """

    num_components = 20
    dim = 92
    degrees_of_freedom = 2.0

    def __init__(self) -> None:
        rng = np.random.RandomState(42)
        shape = (self.num_components, self.dim)
        self.loc = torch.from_numpy(15 * rng.normal(size=shape))
        self.scale_tril = 3 * torch.stack([
            torch.from_numpy(
                np.tril(rng.normal(size=(self.dim, self.dim)))
                + np.diag(np.exp(rng.normal(size=self.dim)))
            )
            for _ in range(self.num_components)
        ])
        self.order = torch.from_numpy(rng.permutation(NUM_INFORMATIVE + self.dim))

    def sample(self, n: int) -> Tensor:
        """Draw samples, shape (n, 92)."""
        component = torch.randint(self.num_components, (n,))
        noise = torch.randn(n, self.dim, dtype=torch.float64)
        # Two degrees of freedom: half the chi-square variable is exponential.
        half = torch.empty(n, 1, dtype=torch.float64).exponential_()
        noise = noise / half.sqrt()
        sample = torch.empty_like(noise)
        for k in range(self.num_components):
            rows = (component == k).nonzero().squeeze(1)
            sample[rows] = self.loc[k] + noise[rows] @ self.scale_tril[k].T
        return sample


@lru_cache(maxsize=1)
def distractor_mixture() -> DistractorMixture:
    """Return the distractors' distribution, which is the same for all tasks."""
    return DistractorMixture()
