"""The refined posterior: samples of the flow, reweighted by the proxy."""

import math
import warnings
from typing import Optional, Tuple, Union

import torch
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from sbi.inference.potentials.base_potential import BasePotential
from sbi.neural_nets.estimators.shape_handling import (
    reshape_to_batch_event,
    reshape_to_sample_batch_event,
)
from sbi.sbi_types import Shape, TorchTransform
from sbi.utils.sbiutils import mcmc_transform
from sbi.utils.torchutils import (
    ensure_theta_batched,
    infer_module_device,
    process_device,
)
from sbi.utils.user_input_checks import process_x
from sbi.utils.user_input_checks_utils import move_distribution_to_device
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys.base_measure import is_inside
from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.moves import metropolis_moves
from sbi_jeffreys.partition import LogPartition, from_log_weights
from sbi_jeffreys.refinement import (
    log_refined,
    sample_with_log_ratio,
    sample_with_log_weights,
    temper,
)


class RefinedPotential(BasePotential):
    r"""Unnormalised log density of the refined posterior.

    .. math:: (1 - \beta) \log p(\theta \mid x) + \beta \, (\log b(\theta) +
        f(\theta, x))

    With $\beta = 1$ it is the potential of the proxy alone, and the flow is not
    asked. Several observations are read as sbi's own potential of NPE reads them: one
    for each parameter or, where sbi's MCMC says so, as independent of each other given
    the parameters:

    .. math:: \textstyle\sum_i \log r(\theta \mid x_i) - (n - 1) \log p_0(\theta)

    Args:
        estimator: Flow and proxy.
        prior: The prior; the potential is minus infinity outside its support.
        exponent: The exponent $\beta$.
        x_o: The observation.
        device: Device of the estimator.
    """

    def __init__(
        self,
        estimator: JeffreysEstimator,
        prior: Distribution,
        exponent: float,
        x_o: Optional[Tensor] = None,
        device: Union[str, torch.device] = "cpu",
    ) -> None:
        super().__init__(prior, x_o, device)
        self.estimator = estimator
        self.exponent = exponent

    def to(self, device: Union[str, torch.device]) -> "RefinedPotential":
        """Move estimator, prior and observation to `device` and return self."""
        super().to(device)
        self.estimator.to(device)
        return self

    def set_x(self, x_o: Optional[Tensor], x_is_iid: Optional[bool] = False) -> None:
        """Set the observation, see `sbi.inference.potentials.base_potential`."""
        super().set_x(x_o, x_is_iid=x_is_iid)

    def __call__(self, theta: Tensor, track_gradients: bool = True) -> Tensor:
        """Return the potential at parameters of shape `(num, *input_shape)`.

        Args:
            theta: Parameters.
            track_gradients: Whether to track gradients.

        Returns:
            Of shape `(num,)`.

        Raises:
            ValueError: If there are several observations, not independent of each
                other, and not as many as parameters.
        """
        theta = ensure_theta_batched(torch.atleast_1d(torch.as_tensor(theta)))
        theta = theta.to(self.device)
        x = reshape_to_batch_event(self.x_o, self.estimator.condition_shape)
        prior = self.prior
        assert prior is not None
        with torch.set_grad_enabled(track_gradients):
            inside = is_inside(prior, theta)
            if len(x) == 1:
                potential = self._log_density(theta.unsqueeze(1), x).squeeze(1)
            elif self.x_is_iid:
                points = theta.unsqueeze(1).expand(-1, len(x), *theta.shape[1:])
                potential = self._log_density(points, x).sum(1)
                # A prior may answer NaN, or raise, outside its support.
                log_prior = torch.zeros_like(potential)
                log_prior[inside] = prior.log_prob(theta[inside])
                potential = potential - (len(x) - 1) * log_prior
            elif len(x) == len(theta):
                potential = self._log_density(theta.unsqueeze(0), x).squeeze(0)
            else:
                raise ValueError(
                    f"{len(x)} observations need one parameter set each, or one "
                    f"observation for all; got {len(theta)} parameter sets."
                )
            return torch.where(inside, potential, -torch.inf)

    def _log_density(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return the unnormalised log density, `(sample_dim, batch_dim)`."""
        log_q = self.estimator.proxy.log_unnormalized(theta, x)
        if self.exponent == 1:
            return log_q
        log_p = self.estimator.log_prob(theta, x)
        return log_refined(log_p, log_q, self.exponent)


def proxy_based_potential(
    estimator: JeffreysEstimator,
    prior: Distribution,
    x_o: Optional[Tensor],
    enable_transform: bool = True,
) -> Tuple[RefinedPotential, TorchTransform]:
    r"""Return the potential of the proxy alone, for any sampler of sbi.

    .. math:: \log b(\theta) + f(\theta, x_o)

    It is to the proxy what `sbi.inference.posterior_estimator_based_potential` is to
    the flow: MCMC, rejection and importance sampling or variational inference on the
    proxy do not depend on samples of the flow.

    Example:
    --------

    ::

        potential, transform = proxy_based_potential(estimator, prior, x_o)
        posterior = MCMCPosterior(potential, proposal=prior, theta_transform=transform)
        samples = posterior.sample((1000,))

    Args:
        estimator: What `JeffreysNPE.train` returned.
        prior: The prior.
        x_o: The observation.
        enable_transform: Whether to transform parameters to unconstrained space.

    Returns:
        The potential and a transformation to unconstrained space.

    Raises:
        TypeError: If `estimator` is not a `JeffreysEstimator`.
    """
    _check_estimator(estimator)
    estimator.eval()
    device = infer_module_device(estimator, fallback="cpu")
    potential = RefinedPotential(estimator, prior, 1.0, x_o, device)
    transform = mcmc_transform(prior, device=device, enable_transform=enable_transform)
    return potential, transform


def _check_estimator(estimator: object) -> None:
    if not isinstance(estimator, JeffreysEstimator):
        raise TypeError(
            "The refined posterior needs the proxy of a JeffreysEstimator, as "
            f"JeffreysNPE.train returns it; got {type(estimator).__name__}."
        )


class RefinedPosterior(NeuralPosterior):
    r"""Posterior whose samples are the flow's, resampled by the proxy.

    .. math:: r_\beta(\theta \mid x) \propto p(\theta \mid x) \,
        w(\theta, x)^\beta, \qquad w = b(\theta) \exp f(\theta, x) /
        p(\theta \mid x)

    The exponent $\beta$ was chosen on validation simulations, see
    `sbi_jeffreys.refinement`: at 0 this is the flow, at 1 the proxy.

    Samples come from sampling importance resampling. How many independent samples
    the weights are worth is told by `effective_sample_size`. Where the weights are
    uneven the same samples are taken again and again; Metropolis moves part them, see
    `sbi_jeffreys.moves`.

    Args:
        estimator: What `JeffreysNPE.train` returned.
        prior: The prior; samples outside its support are left out.
        exponent: The exponent $\beta$; that of the estimator if not given.
        oversampling_factor: Number of samples drawn from the flow for each one kept
            at most, and half as many where hardly any of these has to be taken twice.
            A call for fewer samples than `cheap_num_samples`, in all observations, may
            draw as many as one for so many, and one for less than `min_num_samples` at
            an observation draws as many as one for these.
        num_moves: Number of Metropolis moves $m$ of every sample where nearly all are
            repetitions; $\lceil m \sqrt{\rho} \rceil$ where a share $\rho$ of them
            is, as two copies part slowly however few there are, and none below
            `max_repeated`.
        max_sampling_batch_size: Number of samples of the flow drawn, or moved, at a
            time.
        device: Device of the estimator, found out if not given.

    Raises:
        TypeError: If `estimator` is not a `JeffreysEstimator`.
        ValueError: If `exponent` is not in [0, 1], `oversampling_factor` no whole
            number of at least 1, or `num_moves` below 0.
    """

    #: Below this share of the samples the weights are said to have collapsed.
    min_relative_ess = 0.02
    #: Fewer samples are drawn with as much care as so many: one of four candidates,
    #: however weighted, is still nearly a sample of the flow.
    min_num_samples = 100
    #: The samples of the flow for so many samples take about a second.
    cheap_num_samples = 10_000
    #: Samples of the flow whose differences are the steps of moves: a million of them.
    max_pool_size = 1_000
    #: Share of repeated samples that is left as it is. A classifier, as that of C2ST,
    #: recognises repetitions.
    max_repeated = 0.01

    def __init__(
        self,
        estimator: JeffreysEstimator,
        prior: Distribution,
        exponent: Optional[float] = None,
        oversampling_factor: int = 4,
        num_moves: int = 20,
        max_sampling_batch_size: int = 10_000,
        device: Optional[Union[str, torch.device]] = None,
    ) -> None:
        _check_estimator(estimator)
        exponent = estimator.exponent if exponent is None else exponent
        if not 0 <= exponent <= 1:
            raise ValueError(f"exponent must be between 0 and 1, got {exponent}.")
        if oversampling_factor < 1 or oversampling_factor != int(oversampling_factor):
            raise ValueError(
                "oversampling_factor must be a whole number of at least 1, got "
                f"{oversampling_factor}."
            )
        if num_moves < 0:
            raise ValueError(f"num_moves must not be negative, got {num_moves}.")
        if device is None:
            device = infer_module_device(estimator, fallback="cpu")
        estimator.eval()
        super().__init__(
            potential_fn=RefinedPotential(estimator, prior, exponent, device=device),
            theta_transform=mcmc_transform(prior, device=device),
            device=device,
        )
        self.posterior_estimator = estimator
        self.prior = prior
        self.oversampling_factor = int(oversampling_factor)
        self.num_moves = num_moves
        self.max_sampling_batch_size = max_sampling_batch_size
        self._normalisation: Optional[Tuple[Tensor, int, Tensor]] = None
        self._purpose = (
            """It samples the flow and resamples with the proxy's weights."""
        )

    @property
    def exponent(self) -> float:
        r"""Return the exponent $\beta$. For another, build another posterior."""
        return self.potential_fn.exponent  # type: ignore[attr-defined]

    def to(self, device: Union[str, torch.device]) -> None:
        """Move estimator, prior and the default `x` to `device`.

        Args:
            device: Device to move to.
        """
        device = process_device(device)
        x = self._x
        self.__init__(
            self.posterior_estimator.to(device),
            move_distribution_to_device(self.prior, device),
            self.exponent,
            self.oversampling_factor,
            self.num_moves,
            self.max_sampling_batch_size,
            device,
        )
        if x is not None:
            self.set_default_x(x.to(device))

    def sample(
        self,
        sample_shape: Shape = torch.Size(),
        x: Optional[Tensor] = None,
        max_sampling_batch_size: Optional[int] = None,
        show_progress_bars: bool = True,
    ) -> Tensor:
        r"""Draw samples from the refined posterior.

        Args:
            sample_shape: Shape of the samples.
            x: Observation; the default `x` if not given.
            max_sampling_batch_size: Number of samples of the flow drawn, or moved, at a
                time; the posterior's own if not given.
            show_progress_bars: Ignored; there is no loop to show.

        Returns:
            Samples of shape `(*sample_shape, *input_shape)`.

        Raises:
            ValueError: If `x` holds more than one observation.
        """
        x = self._single_x(x)
        shape = torch.Size(sample_shape)
        return self._resample(shape, x, max_sampling_batch_size).squeeze(-2)

    def sample_batched(
        self,
        sample_shape: Shape,
        x: Tensor,
        max_sampling_batch_size: Optional[int] = None,
        show_progress_bars: bool = True,
    ) -> Tensor:
        r"""Draw samples from the refined posterior of every observation.

        Args:
            sample_shape: Shape of the samples for every observation.
            x: Observations of shape `(batch_dim, *condition_shape)`.
            max_sampling_batch_size: As in `sample`, of all observations together.
            show_progress_bars: Ignored; there is no loop to show.

        Returns:
            Samples of shape `(*sample_shape, batch_dim, *input_shape)`.

        Raises:
            RuntimeError: If the flow leaves the prior at an observation, with its
                place among them.
        """
        shape = self.posterior_estimator.condition_shape
        x = reshape_to_batch_event(process_x(x), shape).to(self._device)
        return self._resample(torch.Size(sample_shape), x, max_sampling_batch_size)

    def log_prob(
        self,
        theta: Tensor,
        x: Optional[Tensor] = None,
        norm_posterior: bool = True,
        track_gradients: bool = False,
        num_samples: int = 10_000,
    ) -> Tensor:
        r"""Return the log density of the refined posterior.

        Args:
            theta: Parameters of shape `(num, *input_shape)`.
            x: Observation; the default `x` if not given.
            norm_posterior: Whether to normalise, by importance sampling. The constant
                of the last observation is kept, so that the densities of several calls
                compare.
            track_gradients: Whether to track gradients.
            num_samples: Number of samples for the normalisation, half of the flow and
                half of what the proxy's base measure is referred to, as the prior.

        Returns:
            Log density of shape `(num,)`; minus infinity outside the prior's support.
        """
        x = self._single_x(x)
        log_prob = self.potential(theta, x, track_gradients)
        if norm_posterior:
            log_prob = log_prob - self._log_normalisation(x, num_samples)
        return log_prob

    def log_prob_batched(
        self,
        theta: Tensor,
        x: Tensor,
        norm_posterior: bool = True,
        track_gradients: bool = False,
        num_samples: int = 10_000,
    ) -> Tensor:
        r"""Return the log density of the refined posterior of every observation.

        Args:
            theta: Parameters of shape `(num, batch_dim, *input_shape)`, or
                `(batch_dim, *input_shape)` for one at every observation.
            x: Observations of shape `(batch_dim, *condition_shape)`.
            norm_posterior: Whether to normalise, by importance sampling.
            track_gradients: Whether to track gradients.
            num_samples: Number of samples for the normalisation at every observation,
                as in `log_prob`.

        Returns:
            Log density of shape `(num, batch_dim)`; minus infinity outside the prior's
            support.

        Raises:
            ValueError: If parameters are for another number of observations.
        """
        estimator = self.posterior_estimator
        x = reshape_to_batch_event(process_x(x), estimator.condition_shape)
        x = x.to(self._device)
        theta = ensure_theta_batched(torch.as_tensor(theta)).to(self._device)
        shape = estimator.input_shape
        has_samples = theta.ndim - len(shape) > 1
        theta = reshape_to_sample_batch_event(theta, shape, has_samples)
        if theta.shape[1] != len(x):
            raise ValueError(
                f"theta must hold parameters for each of {len(x)} observations, in "
                f"shape (num, {len(x)}, num_parameters); got them for {theta.shape[1]}."
            )
        with torch.set_grad_enabled(track_gradients):
            log_density = self.potential_fn._log_density(theta, x)  # type: ignore[attr-defined]
            log_prob = torch.where(self._is_inside(theta), log_density, -torch.inf)
            if norm_posterior:
                log_prob = log_prob - self._normalise(x, num_samples).debiased
            return log_prob

    def effective_sample_size(
        self, x: Optional[Tensor] = None, num_samples: int = 10_000
    ) -> Tensor:
        r"""Return how many independent samples the flow's samples are worth.

        .. math:: \left(\sum_i w_i^\beta\right)^2 / \sum_i w_i^{2 \beta}

        Close to `num_samples` where flow and proxy agree. A small value says that they
        do not, and that neither should be trusted at this observation unseen.

        Args:
            x: Observations of shape `(batch_dim, *condition_shape)`; the default `x`
                if not given.
            num_samples: Number of samples of the flow.

        Returns:
            Of shape `(batch_dim,)`.
        """
        x = self._x_else_default_x(x)
        x = reshape_to_batch_event(x, self.posterior_estimator.condition_shape)
        batch_size = self.max_sampling_batch_size
        log_weights = self._propose(num_samples, x.to(self._device), batch_size)[1]
        return from_log_weights(log_weights).effective_sample_size

    def _single_x(self, x: Optional[Tensor]) -> Tensor:
        x = self._x_else_default_x(x)
        x = reshape_to_batch_event(x, self.posterior_estimator.condition_shape)
        if len(x) > 1:
            raise ValueError(
                f"One observation is expected, got {len(x)}. Use `.sample_batched()` "
                "for several observations."
            )
        return x.to(self._device)

    def _propose(
        self, num_samples: int, x: Tensor, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return samples of the flow and their tempered log weights, in batches."""
        estimator = self.posterior_estimator
        batch = max(1, batch_size // len(x))
        thetas, log_weights = [], []
        while num_samples > 0:
            num = min(batch, num_samples)
            theta, log_w = sample_with_log_ratio(
                estimator.flow, estimator.proxy, num, x
            )
            inside = self._is_inside(theta)
            thetas.append(theta)
            log_weights.append(
                temper(log_w.masked_fill(~inside, -torch.inf), self.exponent)
            )
            num_samples -= num
        return torch.cat(thetas), torch.cat(log_weights)

    def _log_normalisation(self, x: Tensor, num_samples: int) -> Tensor:
        kept = self._normalisation
        if kept is None or kept[1] != num_samples or not torch.equal(kept[0], x):
            log_z = self._normalise(x, num_samples).debiased
            self._normalisation = kept = (x, num_samples, log_z)
        return kept[2]

    def _normalise(self, x: Tensor, num_samples: int) -> LogPartition:
        """Return the normalising constant of the tempered density."""
        estimator = self.posterior_estimator
        batch = max(1, self.max_sampling_batch_size // (2 * len(x)))
        left, log_weights = max(1, num_samples // 2), []
        while left > 0:
            num = min(batch, left)
            theta, log_w = sample_with_log_weights(
                estimator.flow, estimator.proxy, num, x, self.exponent
            )
            log_weights.append(log_w.masked_fill(~self._is_inside(theta), -torch.inf))
            left -= num
        return from_log_weights(torch.cat(log_weights))

    def _resample(
        self, sample_shape: torch.Size, x: Tensor, batch_size: Optional[int]
    ) -> Tensor:
        batch_size = self.max_sampling_batch_size if batch_size is None else batch_size
        num_samples = sample_shape.numel()
        theta, log_weights, repeated = self._candidates(num_samples, x, batch_size)
        is_lost = torch.isneginf(log_weights).all(0)
        if is_lost.any():
            raise RuntimeError(
                "All samples of the flow lie outside the prior's support at "
                f"{_which(is_lost)}: far from what was simulated. Check it against the "
                "prior predictive distribution, or use sample_with='mcmc'."
            )
        ess = from_log_weights(log_weights).effective_sample_size
        has_collapsed = ess < self.min_relative_ess * len(theta)
        if has_collapsed.any():
            warnings.warn(
                f"The importance weights have collapsed: {len(theta)} samples of the "
                f"flow are worth {ess.min().item():.0f}. Flow and proxy disagree at "
                f"{_which(has_collapsed)}. Simulate more, or check that the simulator "
                "can produce what was observed; sample_with='direct' gives the flow's "
                "samples without weights.",
                stacklevel=3,
            )
        samples = _take(theta, systematic_resampling(log_weights, num_samples))
        uneven = repeated > self.max_repeated
        if self.num_moves > 0 and uneven.any():
            # Of these all samples move: those repeated are no sample of the posterior.
            samples[:, uneven] = self._move(
                samples[:, uneven],
                x[uneven],
                theta[:, uneven],
                torch.isneginf(log_weights[:, uneven]),
                math.ceil(self.num_moves * math.sqrt(repeated.max().item())),
                batch_size,
            )
        return samples.reshape(*sample_shape, len(x), *theta.shape[2:])

    def _move(
        self,
        samples: Tensor,
        x: Tensor,
        candidates: Tensor,
        is_outside: Tensor,
        num_moves: int,
        batch_size: int,
    ) -> Tensor:
        """Return samples after Metropolis moves by differences of the flow's samples.

        Differences of the resampled ones, each among them itself, would draw few
        samples together.
        """
        inside = torch.zeros(is_outside.shape, device=x.device)
        inside = inside.masked_fill(is_outside, -torch.inf)
        num_pool = min(len(candidates), self.max_pool_size)
        pool = _take(candidates, systematic_resampling(inside, num_pool))
        num_rows = max(1, batch_size // len(x))

        def log_density(theta: Tensor) -> Tensor:
            parts = theta.split(num_rows)
            return torch.cat([self._log_density(part, x) for part in parts])

        return metropolis_moves(log_density, samples, num_moves, pool)

    def _candidates(
        self, num_samples: int, x: Tensor, batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples of the flow, their log weights and `repeated_share`.

        Twice as many are drawn until hardly any has to be taken twice, or the most
        that may be drawn.
        """
        factor = self.oversampling_factor
        # A single sample never repeats another, however uneven the weights that it was
        # drawn by: few are drawn from as many, and moved as often, as some would be.
        num_samples = max(num_samples, self.min_num_samples)
        most = factor * max(num_samples, self.cheap_num_samples // len(x))
        theta, log_weights = self._propose(num_samples * factor // 2, x, batch_size)
        repeated = repeated_share(log_weights, num_samples)
        while len(theta) < most and (repeated > self.max_repeated).any():
            more = self._propose(min(len(theta), most - len(theta)), x, batch_size)
            theta = torch.cat((theta, more[0]))
            log_weights = torch.cat((log_weights, more[1]))
            repeated = repeated_share(log_weights, num_samples)
        return theta, log_weights, repeated

    @torch.no_grad()
    def _log_density(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return the unnormalised log density, `(num_samples, batch_dim)`."""
        log_density = self.potential_fn._log_density(theta, x)  # type: ignore[attr-defined]
        return log_density.masked_fill(~self._is_inside(theta), -torch.inf)

    def _is_inside(self, theta: Tensor) -> Tensor:
        """Return whether parameters are the prior's, `(num_samples, batch_dim)`.

        The proxy on the Lebesgue measure may lie beyond the prior, and a flow that was
        thrown off beyond all numbers.
        """
        inside = is_inside(self.prior, theta.flatten(0, 1))
        return inside.reshape(theta.shape[:2]) & theta.isfinite().flatten(2).all(-1)


def repeated_share(log_weights: Tensor, num_samples: int) -> Tensor:
    r"""Return the share of samples that repeat others, when drawn by their weights.

    .. math:: \rho = \frac1n \sum_i \max(0, n w_i - 1), \qquad \sum_i w_i = 1

    Systematic resampling takes a sample $\lfloor n w_i \rfloor$ or
    $\lceil n w_i \rceil$ times, and $n w_i$ times in expectation.

    Args:
        log_weights: Of shape `(num_candidates, batch_dim)`.
        num_samples: Number of samples $n$ to draw.

    Returns:
        Of shape `(batch_dim,)`; one where no candidate has a weight.
    """
    taken = num_samples * torch.softmax(log_weights.double(), 0)
    share = (taken - 1).clamp_min(0).sum(0) / max(num_samples, 1)
    return share.nan_to_num(nan=1.0)


def _which(chosen: Tensor) -> str:
    """Name the chosen ones among observations."""
    if len(chosen) == 1:
        return "this observation"
    places = chosen.nonzero().flatten().tolist()
    shown = ", ".join(map(str, places[:10])) + (", ..." if len(places) > 10 else "")
    return f"{len(places)} of {len(chosen)} observations (number {shown})"


def _take(theta: Tensor, index: Tensor) -> Tensor:
    """Return the samples `index`, `(num_samples, batch_dim)`, of each observation."""
    return theta.gather(0, index.unsqueeze(-1).expand(*index.shape, theta.shape[-1]))


def systematic_resampling(log_weights: Tensor, num_samples: int) -> Tensor:
    r"""Return indices of samples drawn in proportion to their weights.

    One uniform number places `num_samples` equally spaced points on the cumulative
    weights, so that a sample of weight $w$ is taken $\lfloor n w \rfloor$ or
    $\lceil n w \rceil$ times: less noise, and fewer repeats, than independent draws
    (Douc and Cappé, "Comparison of Resampling Schemes for Particle Filtering", 2005).

    Args:
        log_weights: Of shape `(num_candidates, batch_dim)`.
        num_samples: Number of indices to draw.

    Returns:
        Indices in random order, of shape `(num_samples, batch_dim)`.
    """
    weights = torch.softmax(log_weights.double(), 0)
    cumulative = weights.cumsum(0).T.contiguous()
    cumulative = cumulative / cumulative[:, -1:]
    batch_dim = log_weights.shape[1]
    offset = torch.rand(batch_dim, 1, dtype=torch.double, device=weights.device)
    points = torch.arange(num_samples, dtype=torch.double, device=weights.device)
    index = torch.searchsorted(cumulative, (points + offset) / max(num_samples, 1))
    index = index.clamp_max(len(weights) - 1).T
    order = torch.rand(index.shape, device=index.device).argsort(0)
    return index.gather(0, order)
