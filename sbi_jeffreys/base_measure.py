r"""Base measures $b(\theta)$ of the energy-based proxy, and how they end.

The proxy is $q(\theta \mid x) = b(\theta) \exp f(\theta, x) / Z(x)$. With the prior as
$b$ it has the prior's shape and support, and $\exp f$ is a likelihood-to-evidence
ratio; with the Lebesgue measure it is the plain energy-based model of the paper.
"""

import math
import warnings
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, Callable, Optional, Tuple

import torch
from sbi.sbi_types import Shape
from sbi.utils import RestrictedPrior
from sbi.utils.sbiutils import ImproperEmpirical, within_support
from sbi.utils.user_input_checks_utils import (
    OneDimPriorWrapper,
    PytorchReturnTypeWrapper,
    move_distribution_to_device,
)
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    constraints,
)

# Where the density is lower by so many nats than at any of the simulations, no
# simulation says what the energy is, and the measure ends.
NEGLIGIBLE = 10.0
# Simulations that the lowest density is taken of.
MAX_SIMULATIONS = 20_000


class BaseMeasure(ABC):
    r"""A base measure $b(\theta)$ and a distribution that covers it.

    Its support is that of the reference, less the tails that are negligible: where
    $\log b(\theta)$ is by more than `NEGLIGIBLE` below its least value at the simulated
    parameters. An energy is anything there, and a flow that leaks into such a tail
    would have the proxy follow it with energies of thousands of nats.

    Args:
        reference: Distribution whose samples cover the support of the measure. It is
            the second proposal, beside the flow, of the partition function.
        theta: Parameters of the simulations, of shape `(batch_dim, *input_shape)`.
            Their spread is the unit of distance beyond the support.
    """

    def __init__(self, reference: Distribution, theta: Tensor) -> None:
        self.reference = reference
        scale = theta.std(0) if len(theta) > 1 else torch.ones_like(theta[0])
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.center = theta.mean(0)
        self._center_is_inside: Optional[bool] = None
        self.floor = -math.inf
        lowest = self._lowest_at(theta[:MAX_SIMULATIONS])
        if lowest is not None:
            self.floor = lowest - NEGLIGIBLE

    def reach(self, theta: Tensor) -> None:
        """Let the measure end beyond all simulations, also those of a later round.

        A proposal may lie where the prior's own simulations never were. Where all are
        within the measure it ends as before.

        Args:
            theta: Parameters of simulations, of shape `(batch_dim, *input_shape)`.
        """
        lowest = self._lowest_at(theta.to(self.scale))
        if lowest is not None and lowest < self.floor:
            self.floor = lowest - NEGLIGIBLE

    def _lowest_at(self, theta: Tensor) -> Optional[float]:
        """Return the least log density at parameters inside, `None` if none are."""
        log_b = self._inside_only(self._log_prob_inside, theta)
        log_b = log_b[log_b.isfinite()]
        return log_b.min().item() if len(log_b) else None

    @abstractmethod
    def _log_prob_inside(self, theta: Tensor) -> Tensor:
        r"""Return $\log b(\theta)$ for parameters inside the support."""

    def log_prob(self, theta: Tensor) -> Tensor:
        r"""Return $\log b(\theta)$, and $-\infty$ outside the support.

        Args:
            theta: Parameters of shape `(*batch_shape, *input_shape)`.

        Returns:
            Log density of shape `batch_shape`.
        """
        log_b = self._inside_only(self._log_prob_inside, theta)
        return log_b.masked_fill(log_b < self.floor, -torch.inf)

    def sample(self, num_samples: int, batch_dim: int) -> Tensor:
        """Return samples of the reference, `(num_samples, batch_dim, *input_shape)`."""
        theta = self.reference.sample(torch.Size((num_samples * batch_dim,)))
        return theta.reshape(num_samples, batch_dim, -1).to(self.scale)

    def reference_log_prob(self, theta: Tensor) -> Tensor:
        r"""Return the log density of the reference, $-\infty$ outside its support.

        Args:
            theta: Parameters of shape `(*batch_shape, *input_shape)`.

        Returns:
            Log density of shape `batch_shape`.
        """
        return self._inside_only(self.reference.log_prob, theta)

    def _inside_only(
        self, log_prob: Callable[[Tensor], Tensor], theta: Tensor
    ) -> Tensor:
        # A prior may answer NaN, or raise, outside its support.
        flat = theta.reshape(-1, theta.shape[-1])
        inside = within_support(self.reference, flat)
        if inside.all():
            result = log_prob(flat)
        else:
            result = flat.new_full((len(flat),), -torch.inf)
            if inside.any():
                result[inside] = log_prob(flat[inside])
        # Torch takes the support of a Beta that is moved and stretched for all reals.
        result = result.masked_fill(result.isnan(), -torch.inf)
        return result.reshape(theta.shape[:-1])

    def extended_log_prob(self, theta: Tensor, slope: float = 10.0) -> Tensor:
        r"""Return $\log b$ at the nearest point of the support, less what it costs.

        .. math:: \log b(c(\theta)) - s \, \lVert (\theta - c(\theta)) / \sigma
            \rVert_1

        with $c(\theta)$ the nearest point inside and $\sigma$ the spread of the
        simulated parameters. It is $\log b(\theta)$ inside, finite everywhere, and its
        gradient outside points back: what leaks beyond the prior costs the flow.
        Where the support is not a box, the way back leads to the mean, or to the
        sample of the reference next to it if the support leaves the mean out.

        Args:
            theta: Parameters of shape `(*batch_shape, *input_shape)`.
            slope: Cost $s$ in nats of one standard deviation beyond the support.

        Returns:
            Extended log density of shape `batch_shape`.
        """
        flat = theta.reshape(-1, theta.shape[-1])
        nearest = self._clamp(flat.detach())
        log_b, beyond = self._extend(flat, nearest)
        outside = ~(log_b.detach().isfinite() & (log_b.detach() >= self.floor))
        if outside.any():  # the support is no box, or smaller than it says
            inner = self._inner_point()
            nearest = torch.where(outside.unsqueeze(-1), inner, nearest)
            log_b, beyond = self._extend(flat, nearest)
        return (log_b - slope * beyond).reshape(theta.shape[:-1])

    def _inner_point(self) -> Tensor:
        """Return the mean or, if that is outside, a sample inside next to it."""
        if self._center_is_inside is None:
            center = self.center.unsqueeze(0)
            self._center_is_inside = bool(self.log_prob(center).isfinite().all())
            if not self._center_is_inside:
                theta = self.sample(1000, 1).squeeze(1)
                theta = theta[self.log_prob(theta).isfinite()]
                if len(theta):
                    distance = ((theta - center) / self.scale).square().sum(-1)
                    self.center = theta[distance.argmin()]
        return self.center

    def _extend(self, theta: Tensor, nearest: Tensor) -> Tuple[Tensor, Tensor]:
        """Return the density at the nearest points, and the distances to them."""
        stays = (theta.detach() == nearest).all(-1)
        # Inside the gradient is that of log b itself; outside that of the distance.
        point = torch.where(stays.unsqueeze(-1), theta, nearest)
        beyond = ((theta - nearest) / self.scale).abs().sum(-1)
        beyond = torch.where(stays, torch.zeros_like(beyond), beyond)
        return self._log_prob_inside(point), beyond

    def _clamp(self, theta: Tensor) -> Tensor:
        """Return the nearest points of a support that is a box, else `theta`."""
        bounds = support_bounds(self.reference, theta.shape[-1])
        if bounds is None:
            return theta
        low, high = (bound.to(theta) for bound in bounds)
        # Strictly inside: a density may be zero on the border, or infinite. One step
        # of the number format where the spread is below it.
        step, inf = 1e-6 * self.scale, torch.full_like(low, torch.inf)
        low = torch.maximum(low + step, torch.nextafter(low, inf))
        high = torch.minimum(high - step, torch.nextafter(high, -inf))
        return torch.minimum(torch.maximum(theta, low), high)

    def to(self, device: str | torch.device) -> "BaseMeasure":
        """Move to `device` and return self."""
        if self.scale.device == torch.device(device):
            return self
        self.reference = move_distribution_to_device(self.reference, device)
        self.scale, self.center = self.scale.to(device), self.center.to(device)
        return self


class PriorMeasure(BaseMeasure):
    r"""The prior as base measure, $b = p_0$."""

    def _log_prob_inside(self, theta: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and theta.requires_grad):
            return self.reference.log_prob(theta)
        try:
            log_prob = self.reference.log_prob(theta)
            # Its own gradient, or uniform, which one point does not tell.
            differ = bool((theta != theta[:1]).any())
            if log_prob.requires_grad or (differ and (log_prob == log_prob[0]).all()):
                return log_prob
        except RuntimeError:  # "Can't call numpy() on Tensor that requires grad."
            pass
        return self._log_prob_by_differences(theta)

    def _log_prob_by_differences(self, theta: Tensor) -> Tensor:
        """Return the log density with a gradient where the prior has none.

        Priors that sbi wraps from scipy leave torch. Their gradient is taken by central
        differences, written as a term that is zero in value.
        """
        point = theta.detach()
        gradient = torch.stack(
            [
                # A step may lead out of the support, where a prior may raise.
                (
                    self.reference_log_prob(point + step)
                    - self.reference_log_prob(point - step)
                )
                / (2 * step.sum())
                for step in torch.diag(1e-3 * self.scale)
            ],
            dim=-1,
        )
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        log_prob = self.reference.log_prob(point)
        return log_prob + (gradient * (theta - point)).sum(-1)


class LebesgueMeasure(BaseMeasure):
    r"""The Lebesgue measure on the support of the reference, $b = 1$."""

    def _log_prob_inside(self, theta: Tensor) -> Tensor:
        inside = torch.isfinite(self.reference_log_prob(theta.detach()))
        return torch.where(inside, 0.0, -torch.inf).to(theta)


def make_base_measure(
    name: str, prior: Optional[Distribution], theta: Tensor
) -> BaseMeasure:
    """Return the base measure called `name`.

    Without a proper prior only the Lebesgue measure is possible. Its reference is
    then a Gaussian with the mean and twice the spread of the simulated parameters.

    Args:
        name: `"prior"` or `"lebesgue"`.
        prior: The prior; `None` or sbi's `ImproperEmpirical` where none was given.
        theta: Parameters of the simulations, of shape `(batch_dim, *input_shape)`.

    Returns:
        The base measure.
    """
    if prior is None or isinstance(prior, ImproperEmpirical):
        if name == "prior":
            warnings.warn(
                "No prior was given, so the proxy takes the Lebesgue measure as its "
                "base measure instead of the prior. Pass a prior to JeffreysNPE for a "
                "proxy with the prior's support.",
                stacklevel=2,
            )
        spread = torch.atleast_2d(torch.cov(theta.T))
        jitter = 1e-6 * torch.diag(spread.diagonal().clamp_min(1e-30))
        reference = MultivariateNormal(
            theta.mean(0),
            4 * spread + jitter,
            validate_args=False,
        )
        return LebesgueMeasure(reference, theta)
    has_event = prior.event_shape or isinstance(prior, OneDimPriorWrapper)
    if not has_event and len(prior.batch_shape) == 1:
        # sbi takes Uniform(low, high) with vectors for a prior over a vector.
        prior = Independent(prior, 1, validate_args=False)
    # Moving the proxy to another device must not move the user's prior.
    prior = deepcopy(prior)
    if isinstance(prior, RestrictedPrior):
        prior = _RestrictedReference(prior)
    with torch.random.fork_rng(devices=[]):
        device = prior.sample(torch.Size((1,))).device
    if device != theta.device:  # sbi builds on the CPU what it trains elsewhere
        prior = move_distribution_to_device(prior, theta.device)
    measure = PriorMeasure if name == "prior" else LebesgueMeasure
    return measure(prior, theta)


def event_shape(prior: Distribution) -> torch.Size:
    """Return the shape of one parameter set, also of what sbi gives no shape."""
    if isinstance(prior, RestrictedPrior):
        return event_shape(prior._prior)
    if isinstance(prior, (OneDimPriorWrapper, PytorchReturnTypeWrapper)):
        return event_shape(prior.prior)
    # sbi takes Uniform(low, high) with vectors for a prior over a vector.
    return prior.event_shape or prior.batch_shape


def is_inside(prior: Distribution, theta: Tensor) -> Tensor:
    """Return whether parameters lie within the support, `(batch_dim,)`.

    Of a `RestrictedPrior` sbi's `within_support` asks for the unrestricted support.
    """
    if not isinstance(prior, RestrictedPrior):
        return within_support(prior, theta)
    inside = is_inside(prior._prior, theta)
    if inside.any():
        inside[inside.clone()] = prior._accept_reject_fn(theta[inside]).bool()
    return inside


class _RestrictedReference(Distribution):
    """sbi's `RestrictedPrior` with an event shape, and without its messages.

    Args:
        prior: The restricted prior.
    """

    # Accepted samples behind the constant of the density: an error of 2 %.
    NUM_SAMPLES = 2_000

    def __init__(self, prior: RestrictedPrior) -> None:
        super().__init__(event_shape=event_shape(prior), validate_args=False)
        self.prior = prior

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        return self.prior.sample(tuple(sample_shape), print_rejected_frac=False)

    def log_prob(self, value: Tensor) -> Tensor:
        prior = self.prior
        if prior.acceptance_rate is None:
            prior.sample(
                torch.Size((self.NUM_SAMPLES,)),
                sample_with="rejection",
                save_acceptance_rate=True,
                print_rejected_frac=False,
            )
        inside = is_inside(prior, value)
        log_prob = value.new_full(value.shape[:1], -torch.inf)
        if inside.any():
            constant = torch.as_tensor(prior.acceptance_rate).log()
            values = prior._prior.log_prob(value[inside])
            # One for every parameter, where sbi takes a batch of priors for one over
            # all.
            log_prob[inside] = values.reshape(len(values), -1).sum(1) - constant
        return log_prob

    def to(self, device: str | torch.device) -> None:
        """Move the prior; what it accepts by is the user's and stays."""
        self.prior._prior = move_distribution_to_device(self.prior._prior, device)
        self.prior._device = str(device)


def support_bounds(
    distribution: Distribution, num_parameters: int
) -> Optional[Tuple[Tensor, Tensor]]:
    """Return lower and upper bounds of a support that is a box, else None."""
    try:
        return _constraint_bounds(distribution.support, num_parameters)
    except (NotImplementedError, AttributeError):  # no support, or none known
        return None


def _constraint_bounds(
    constraint: Any, num_parameters: int
) -> Optional[Tuple[Tensor, Tensor]]:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if isinstance(constraint, constraints.cat):  # sbi's MultipleIndependent
        parts = [
            _constraint_bounds(part, length)
            for part, length in zip(constraint.cseq, constraint.lengths, strict=True)
        ]
        if any(part is None for part in parts):
            return None
        # Bounds that are mere numbers, as that of a Gamma, are on the CPU.
        bounds = ((low.cpu(), high.cpu()) for low, high in filter(None, parts))
        low, high = zip(*bounds, strict=True)
        return torch.cat(low), torch.cat(high)
    low = getattr(constraint, "lower_bound", None)
    high = getattr(constraint, "upper_bound", None)
    if low is None and high is None and constraint is not constraints.real:
        return None
    low = torch.as_tensor(-torch.inf if low is None else low, dtype=torch.float32)
    high = torch.as_tensor(torch.inf if high is None else high, dtype=torch.float32)
    return low.expand(num_parameters), high.expand(num_parameters)
