r"""Coordinates of the parameters: residuals of their linear regression on the data.

.. math:: u(\theta, x) = L^{-1} (z(\theta) - A \, \varphi(x) - a)

with features $\varphi$ of the data and the Cholesky factor $L$ of the residuals'
covariance. Where the posterior is a Gaussian whose mean is linear in the features, $u$
is standard normal given any $x$, and nothing is left to learn; elsewhere the networks
learn what the regression leaves. From few simulations that is a better start than
$\theta$ itself, and the regression is known in closed form. Parameters whose prior is
bounded below only enter by the logarithm of their distance to the bound.

A regression is nearer to the simulations that it was fitted to than to any others, the
more so the fewer there are. Networks that learn from its residuals at the same
simulations would be too sure at all others. While they learn, the residual of a
simulation's own parameters is therefore that of the regression without it,

.. math:: z_j - \hat z_{-j} = \frac{z_j - \hat z_j}{1 - h_j}, \qquad
    h_j = \tfrac1n + \tilde\varphi_j^\top (\tilde\Phi^\top \tilde\Phi + \alpha I)^{-1}
    \tilde\varphi_j

with the centred features $\tilde\varphi$ and the ridge penalty $\alpha$ [1].

[1] G. Golub, M. Heath, G. Wahba, "Generalized Cross-Validation as a Method for
Choosing a Good Ridge Parameter", Technometrics 21, 1979.
"""

import math
from typing import Any, Optional, Tuple

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn
from torch.distributions import Distribution

from sbi_jeffreys.base_measure import support_bounds
from sbi_jeffreys.features import MAX_SIMULATIONS, Features

# Ridge penalties among which leave-one-out errors choose, for every parameter alone.
PENALTIES = np.logspace(-2, 5, 22)
# The regression is not asked to go farther than the parameters went.
MAX_PREDICTION = 5.0
# A simulation that the regression goes through says nothing of how far it is from
# others.
MAX_LEVERAGE = 0.95


class ResidualCoordinates(nn.Module):
    r"""Residual coordinates $u(\theta, x)$, fitted to simulations.

    Args:
        theta: Parameters of shape `(num_simulations, num_parameters)`.
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`.
        features: Features of `x`.
        prior: The prior, for the bounds of its support.

    Attributes:
        holds_out: Whether networks learn from the simulations that the regression was
            fitted to.
    """

    holds_out: bool = False
    lower: Tensor
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    cholesky: Tensor
    whitening: Tensor
    center: Tensor
    directions: Tensor
    leverages: Tensor

    def __init__(
        self,
        theta: Tensor,
        x: Tensor,
        features: Features,
        prior: Optional[Distribution] = None,
    ) -> None:
        super().__init__()
        theta, x = theta[:MAX_SIMULATIONS], x[:MAX_SIMULATIONS]
        lower = torch.full_like(theta[0], torch.nan)
        bounds = None if prior is None else support_bounds(prior, theta.shape[1])
        if bounds is not None:
            low, high = (bound.to(theta) for bound in bounds)
            lower = torch.where(low.isfinite() & high.isinf(), low, lower)
        self.register_buffer("lower", lower)
        z = self._unbounded(theta)
        self.register_buffer("mean", z.mean(0))
        # Of very few simulations, or where all lie outside the prior, it may be zero.
        scale = z.std(0)
        self.register_buffer("scale", torch.where(scale > 0, scale, 1.0))
        z = (z - self.mean) / self.scale
        inputs = features(x)
        weight, bias, penalties = _ridge_regression(inputs, z)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self._keep_leverages(inputs, penalties)
        residuals = (z - self.predict(inputs)) / (1 - self.leverage(inputs))
        covariance = torch.atleast_2d(torch.cov(residuals.double().T))
        num_parameters = theta.shape[1]
        identity = torch.eye(num_parameters).to(covariance)
        cholesky = torch.linalg.cholesky(covariance + 1e-6 * identity)
        whitening = torch.linalg.solve_triangular(cholesky, identity, upper=False)
        self.register_buffer("cholesky", cholesky.to(theta))
        self.register_buffer("whitening", whitening.to(theta))

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return len(self.mean)

    def standardize(self, theta: Tensor) -> Tensor:
        r"""Return $z(\theta)$: parameters of mean zero and standard deviation one.

        Args:
            theta: Parameters of shape `(..., num_parameters)`.
        """
        return (self._unbounded(theta) - self.mean) / self.scale

    def predict(self, features: Tensor) -> Tensor:
        r"""Return the regression $A \varphi + a$ of $z$, `(batch_dim, num_parameters)`.

        Args:
            features: Features of shape `(batch_dim, num_features)`.
        """
        prediction = features @ self.weight.T + self.bias
        return prediction.clamp(-MAX_PREDICTION, MAX_PREDICTION)

    def leverage(self, features: Tensor) -> Tensor:
        r"""Return how far a simulation draws the regression to itself, $h$.

        Args:
            features: Features of shape `(batch_dim, num_features)`.

        Returns:
            Of shape `(batch_dim, num_parameters)`, as each has its own penalty.
        """
        squares = ((features - self.center) @ self.directions).square()
        return (squares @ self.leverages[1:] + self.leverages[0]).clamp_max(
            MAX_LEVERAGE
        )

    def residual(
        self, z: Tensor, features: Tensor, first_is_own: bool = False
    ) -> Tensor:
        r"""Return $u = L^{-1} (z - A \varphi - a)$ of the shape of `z`.

        Args:
            z: Standardised parameters of shape `(..., batch_dim, num_parameters)`.
            features: Features of shape `(batch_dim, num_features)`.
            first_is_own: Whether the first parameters are those of the simulations
                themselves. In training, where the regression was fitted to these
                (`holds_out`), their residuals are those of one without them.
        """
        residual = z - self.predict(features)
        if first_is_own and self.training and self.holds_out:
            own = residual[:1] / (1 - self.leverage(features))
            residual = torch.cat((own, residual[1:]))
        return residual @ self.whitening.T

    def forward(
        self, theta: Tensor, features: Tensor, first_is_own: bool = False
    ) -> Tensor:
        r"""Return $u(\theta, x)$ of the shape of `theta`.

        Args:
            theta: Parameters of shape `(..., batch_dim, num_parameters)`.
            features: Features of shape `(batch_dim, num_features)`.
            first_is_own: As for `residual`.
        """
        return self.residual(self.standardize(theta), features, first_is_own)

    def inverse(self, u: Tensor, features: Tensor) -> Tensor:
        r"""Return $\theta(u, x)$ of the shape of `u`.

        Args:
            u: Residual coordinates of shape `(..., batch_dim, num_parameters)`.
            features: Features of shape `(batch_dim, num_features)`.
        """
        z = u @ self.cholesky.T + self.predict(features)
        unbounded = z * self.scale + self.mean
        lower = self.lower
        # Not of parameters without a bound, whose exponential may be infinite: zero
        # times infinity is no gradient. Nor of what would not fit into the numbers.
        limit = -math.log(torch.finfo(u.dtype).tiny)
        logarithm = torch.where(lower.isnan(), 0.0, unbounded).clamp(-limit, limit)
        return torch.where(lower.isnan(), unbounded, lower + logarithm.exp())

    def log_abs_det(self, theta: Tensor) -> Tensor:
        r"""Return $\log |\partial u / \partial \theta|$ of shape `theta.shape[:-1]`.

        Args:
            theta: Parameters of shape `(..., num_parameters)`.
        """
        cholesky, scale = self.cholesky, self.scale
        lower = self.lower
        logs = torch.where(lower.isnan(), 0.0, self._unbounded(theta))
        return -cholesky.diagonal().log().sum() - scale.log().sum() - logs.sum(-1)

    def _keep_leverages(self, inputs: Tensor, penalties: Tensor) -> None:
        r"""Keep what `leverage` needs, $\tilde\Phi^\top \tilde\Phi$ by its axes.

        Args:
            inputs: Features of the simulations, `(num_simulations, num_features)`.
            penalties: $\alpha$ of every parameter, `(num_parameters,)`.
        """
        center = inputs.double().mean(0)
        _, singular_values, directions = torch.linalg.svd(
            inputs.double() - center, full_matrices=False
        )
        inverse = 1 / (singular_values.square()[:, None] + penalties)
        mean = torch.full_like(penalties, 1 / len(inputs))[None]  # of the intercept
        # Only a training with these simulations needs them, from which they can be
        # made again. Of many outputs they are larger than all else, and the state of
        # the networks is copied in every epoch.
        for name, value in (
            ("center", center),
            ("directions", directions.T.contiguous()),
            ("leverages", torch.cat((mean, inverse))),
        ):
            self.register_buffer(name, value.to(inputs), persistent=False)

    def _unbounded(self, theta: Tensor) -> Tensor:
        lower = self.lower
        # Parameters at or below the bound have no logarithm; the floor keeps gradients
        # finite. Their density is settled by the prior.
        tiny = torch.finfo(theta.dtype).tiny
        distance = torch.where(lower.isnan(), 1.0, theta - lower).clamp_min(tiny)
        return torch.where(lower.isnan(), theta, distance.log())


def _ridge_regression(inputs: Tensor, z: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Return weights, intercepts and penalties of the regression of every column.

    Args:
        inputs: Features of shape `(num_simulations, num_features)`.
        z: Standardised parameters of shape `(num_simulations, num_parameters)`.

    Returns:
        Of shapes `(num_parameters, num_features)`, and twice `(num_parameters,)`.
    """
    num_parameters = z.shape[1]
    if inputs.shape[1] == 0:
        weight = z.new_zeros(num_parameters, 0)
        return weight, z.mean(0), torch.ones_like(z[0], dtype=torch.double)
    regression: Any = RidgeCV(
        alphas=PENALTIES * len(z) / 1000, alpha_per_target=True
    ).fit(inputs.cpu().numpy(), z.cpu().numpy())
    weight = np.reshape(regression.coef_, (num_parameters, -1))
    # Of a single parameter they are numbers.
    bias, penalties = (
        np.broadcast_to(values, (num_parameters,)).copy()
        for values in (regression.intercept_, regression.alpha_)
    )
    return (
        torch.from_numpy(weight).to(z),
        torch.from_numpy(bias).to(z),
        torch.from_numpy(penalties).to(z.device),
    )


def hold_out(networks: nn.Module, holds_out: bool) -> None:
    """Say whether networks learn from the simulations that they were built with.

    Args:
        networks: Networks, of whose `ResidualCoordinates` it is said.
        holds_out: Whether they do.
    """
    for module in networks.modules():
        if isinstance(module, ResidualCoordinates):
            module.holds_out = holds_out
