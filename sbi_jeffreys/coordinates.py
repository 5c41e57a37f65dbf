r"""Coordinates of the parameters: residuals of their linear regression on the data.

.. math:: u(\theta, x) = L^{-1} (z(\theta) - A \, \varphi(x) - a)

with features $\varphi$ of the data and the Cholesky factor $L$ of the residuals'
covariance. Where the posterior is a Gaussian whose mean is linear in the features, $u$
is standard normal given any $x$, and nothing is left to learn; elsewhere the networks
learn what the regression leaves. From few simulations that is a better start than
$\theta$ itself, and the regression is known in closed form. Parameters whose prior is
bounded on one side only enter by the logarithm of their distance to the bound.
"""

from typing import Any, Optional

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


class ResidualCoordinates(nn.Module):
    r"""Residual coordinates $u(\theta, x)$, fitted to simulations.

    Args:
        theta: Parameters of shape `(num_simulations, num_parameters)`.
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`.
        features: Features of `x`.
        prior: The prior, for the bounds of its support.
    """

    lower: Tensor
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    cholesky: Tensor
    whitening: Tensor

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
        regression: Any = RidgeCV(
            alphas=PENALTIES * len(theta) / 1000, alpha_per_target=True
        ).fit(inputs.cpu().numpy(), z.cpu().numpy())
        num_parameters = theta.shape[1]
        weight = np.reshape(regression.coef_, (num_parameters, -1))
        bias = np.broadcast_to(regression.intercept_, (num_parameters,)).copy()
        self.register_buffer("weight", torch.from_numpy(weight).to(theta))
        self.register_buffer("bias", torch.from_numpy(bias).to(theta))
        residuals = (z - self.predict(inputs)).double()
        covariance = torch.atleast_2d(torch.cov(residuals.T))
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

    def residual(self, z: Tensor, features: Tensor) -> Tensor:
        r"""Return $u = L^{-1} (z - A \varphi - a)$ of the shape of `z`.

        Args:
            z: Standardised parameters of shape `(..., batch_dim, num_parameters)`.
            features: Features of shape `(batch_dim, num_features)`.
        """
        residual = z - self.predict(features)
        return residual @ self.whitening.T

    def forward(self, theta: Tensor, features: Tensor) -> Tensor:
        r"""Return $u(\theta, x)$ of the shape of `theta`.

        Args:
            theta: Parameters of shape `(..., batch_dim, num_parameters)`.
            features: Features of shape `(batch_dim, num_features)`.
        """
        return self.residual(self.standardize(theta), features)

    def inverse(self, u: Tensor, features: Tensor) -> Tensor:
        r"""Return $\theta(u, x)$ of the shape of `u`.

        Args:
            u: Residual coordinates of shape `(..., batch_dim, num_parameters)`.
            features: Features of shape `(batch_dim, num_features)`.
        """
        z = u @ self.cholesky.T + self.predict(features)
        unbounded = z * self.scale + self.mean
        lower = self.lower
        return torch.where(lower.isnan(), unbounded, lower + unbounded.exp())

    def log_abs_det(self, theta: Tensor) -> Tensor:
        r"""Return $\log |\partial u / \partial \theta|$ of shape `theta.shape[:-1]`.

        Args:
            theta: Parameters of shape `(..., num_parameters)`.
        """
        cholesky, scale = self.cholesky, self.scale
        lower = self.lower
        logs = torch.where(lower.isnan(), 0.0, self._unbounded(theta))
        return -cholesky.diagonal().log().sum() - scale.log().sum() - logs.sum(-1)

    def _unbounded(self, theta: Tensor) -> Tensor:
        lower = self.lower
        # Parameters at or below the bound have no logarithm; the floor keeps gradients
        # finite. Their density is settled by the prior.
        tiny = torch.finfo(theta.dtype).tiny
        distance = torch.where(lower.isnan(), 1.0, theta - lower).clamp_min(tiny)
        return torch.where(lower.isnan(), theta, distance.log())
