r"""Density estimation without conditions, by the conventions of scikit-learn.

The paper's own problem: samples $\theta_1, \ldots, \theta_n \sim \pi(\theta)$ and no
$x$. `JeffreysNPE` learns it as a posterior that is the same at every condition.
"""

import math
import warnings
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Literal, Optional, Union

import numpy as np
import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.neural_nets.estimators.base import ConditionalEstimatorBuilder
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.energy_builder import EnergyBuilder, energy_nn
from sbi_jeffreys.epoch_metrics import EPOCH_METRICS
from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.objective import JeffreysObjective, Proposals, ProxySamples
from sbi_jeffreys.partition import LogPartition, from_log_weights
from sbi_jeffreys.persistence import keeping_random_state
from sbi_jeffreys.posterior import RefinedPosterior
from sbi_jeffreys.refinement import log_refined, sample_with_log_weights
from sbi_jeffreys.tracking import NoTracker
from sbi_jeffreys.trainer import LEARNING_RATE, JeffreysNPE
from sbi_jeffreys.weights import Weights

# Samples behind the normalising constants of the proxy and of the refined density.
NUM_PARTITION_SAMPLES = 20_000
# Points whose density is taken at once, which bounds the memory.
BATCH_SIZE = 10_000

Model = Literal["flow", "proxy", "refined"]
OnEpoch = Callable[[int, JeffreysEstimator], None]


class SharedPartitionObjective(JeffreysObjective):
    r"""The Jeffreys objective where all conditions are the same.

    Without a condition there is one $Z$. The importance samples that
    `JeffreysObjective` draws for every simulation serve the whole batch:

    .. math:: \hat Z = \frac{1}{n (K + M)} \sum_{j = 1}^n \sum_{i = 1}^{K + M}
        \frac{b(\theta_{ij}) \exp f(\theta_{ij})}{m(\theta_{ij})}

    so that few of them for every simulation are enough. The divergences are those of
    `JeffreysObjective`.

    Args:
        num_flow_samples: $K$, samples of the flow for every sample of the data.
        num_reference_samples: $M$, samples of the reference, likewise.
        num_reverse_samples: As in `JeffreysObjective`.

    Raises:
        ValueError: If a number of samples is below 1.
    """

    def __init__(
        self,
        num_flow_samples: int = 4,
        num_reference_samples: int = 4,
        num_reverse_samples: int = 1,
    ) -> None:
        super().__init__(num_flow_samples, num_reference_samples, num_reverse_samples)

    def _log_partition(self, log_weights: Tensor) -> LogPartition:
        return _pool(super()._log_partition(log_weights))

    def sample_proxy(
        self,
        proxy: ConditionalEnergy,
        x: Tensor,
        proposals: Proposals,
        num_samples: int,
        num_moves: int = 0,
    ) -> ProxySamples:
        r"""Draw samples of the proxy among the proposals at all conditions.

        Args:
            proxy: The proxy $q$.
            x: Conditions of shape `(batch_dim, *condition_shape)`, all the same.
            proposals: What `propose` drew at these conditions.
            num_samples: Number of samples at every condition.
            num_moves: Number of moves of each.

        Returns:
            The samples, with the same $\log Z$ for every condition.
        """
        num = len(x)
        pooled = Proposals(
            proposals.theta.flatten(0, 1).unsqueeze(1),
            proposals.log_weights.reshape(-1, 1),
            proposals.log_ratio.reshape(-1, 1),
        )
        drawn = super().sample_proxy(proxy, x[:1], pooled, num * num_samples, num_moves)
        return ProxySamples(
            drawn.theta.reshape(num_samples, num, *drawn.theta.shape[2:]),
            drawn.log_prob.reshape(num_samples, num),
            drawn.log_partition.expand(num),
            drawn.effective_sample_size.expand(num),
        )


def _pool(each: LogPartition) -> LogPartition:
    """Return one estimate from those of several conditions that are the same."""
    num = len(each.value)
    log_sum = each.value.logsumexp(0)
    squares = 2 * each.value.detach() - each.effective_sample_size.log()
    effective_sample_size = (2 * log_sum.detach() - squares.logsumexp(0)).exp()
    return LogPartition(
        (log_sum - math.log(num)).expand(num),
        effective_sample_size.expand(num),
        num * each.num_samples,
    )


class _Trainer(JeffreysNPE):
    """`JeffreysNPE` that tells of its epochs.

    Args:
        on_epoch: Called after every epoch with its number, from 0, and both models.
        **kwargs: As in `JeffreysNPE`.
    """

    def __init__(self, on_epoch: Optional[OnEpoch] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._on_epoch = on_epoch

    def _summarize_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._summarize_epoch(*args, **kwargs)
        if self._on_epoch is not None:
            # What is drawn there must not change the training.
            with keeping_random_state(self._device), torch.no_grad():
                was_training = self._estimator.training
                self._estimator.eval()
                self._on_epoch(self.epoch, self._estimator)
                self._estimator.train(was_training)

    def __getstate__(self) -> Dict:
        return {**super().__getstate__(), "_on_epoch": None}


class JeffreysDensityEstimator(DensityMixin, BaseEstimator):
    r"""Density of samples under the adaptive constrained Jeffreys objective.

    A normalizing flow $p(\theta)$ and an energy-based proxy $q(\theta) = b(\theta)
    \exp f(\theta) / Z$ are trained together on samples of $\pi(\theta)$:

    .. math:: \min_{p, q} \lambda_1 \mathrm{KL}(\pi \Vert p) +
        \lambda_2 \mathrm{KL}(p \Vert q) + \lambda_3 \mathrm{KL}(\pi \Vert q)

    with weights $\lambda$ set by dual ascent [1]. It is `JeffreysNPE` with a condition
    that never changes.

    [1] O. Ben-Dov and L. F. O. Chamon, "Adaptive Symmetrization of the KL Divergence",
    arXiv:2511.11159.

    Example:
    --------

    ::

        from sklearn.datasets import make_moons
        from sbi_jeffreys import JeffreysDensityEstimator

        X, _ = make_moons(1000, noise=0.1, random_state=0)
        density = JeffreysDensityEstimator(random_state=0).fit(X)
        density.score_samples(X)       # log densities
        density.sample(1000)           # new samples

    Args:
        flow: The flow: the name of a flow of sbi's, or a builder, as `JeffreysNPE`'s
            `density_estimator`.
        energy: Builder of the proxy as `energy_nn` returns it. If not given, that of
            `energy_nn` on the base measure below. One given takes the base measure as
            its prior.
        base_measure: Base measure $b$ of the proxy. `"gaussian"` for the Gaussian with
            mean and covariance of the data: the proxy starts as the best Gaussian.
            `"lebesgue"` for the Lebesgue measure, the paper's form: the proxy has to
            learn from nothing where the data end, which many dimensions do not allow.
            Or a distribution, in whose support all data must lie, and do the samples of
            `"proxy"` and `"refined"`.
        weights: `"adaptive"`, `"fixed"` or an instance of `Weights`.
        objective: Numbers of samples behind the divergences,
            `SharedPartitionObjective()` if not given.
        model: Density that `score_samples`, `score` and `sample` are about: the
            `"flow"`, the `"proxy"`, or the `"refined"` density between the two, whose
            exponent validation data choose. May be changed after `fit`.
        training_batch_size: As in `sbi.inference.NPE.train`.
        learning_rate: As in `JeffreysNPE.train`.
        validation_fraction: As in `sbi.inference.NPE.train`.
        stop_after_epochs: As in `sbi.inference.NPE.train`, for every stage.
        max_num_epochs: As in `sbi.inference.NPE.train`, a third of it for each stage.
        clip_max_norm: As in `sbi.inference.NPE.train`.
        random_state: Seed of networks, training and normalising constants. Torch's
            own random numbers are left as they were.
        device: Device of the training.
        verbose: Whether to print the progress of the training.

    Attributes:
        inference_: The trainer, a `JeffreysNPE`.
        estimator_: Flow and proxy, a `JeffreysEstimator`.
        flow_: The flow.
        proxy_: The proxy.
        exponent_: Exponent $\beta$ of the refined density, chosen in training.
        log_partition_: Log normalising constants of the `"proxy"` and the `"refined"`
            density with their effective sample sizes, from importance sampling.
        history_: Lists with one entry an epoch: divergences, dual variables, log
            partition function, stage; see `sbi_jeffreys.epoch_metrics`.
        n_features_in_: Number of columns of the data.
    """

    def __init__(
        self,
        flow: Union[str, ConditionalEstimatorBuilder] = "nsf",
        *,
        energy: Optional[EnergyBuilder] = None,
        base_measure: Union[Literal["gaussian", "lebesgue"], Distribution] = "gaussian",
        weights: Union[Literal["adaptive", "fixed"], Weights] = "adaptive",
        objective: Optional[JeffreysObjective] = None,
        model: Model = "flow",
        training_batch_size: int = 200,
        learning_rate: float = LEARNING_RATE,
        validation_fraction: float = 0.1,
        stop_after_epochs: int = 20,
        max_num_epochs: int = 2**31 - 1,
        clip_max_norm: Optional[float] = 5.0,
        random_state: Union[None, int, np.random.RandomState] = None,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        self.flow = flow
        self.energy = energy
        self.base_measure = base_measure
        self.weights = weights
        self.objective = objective
        self.model = model
        self.training_batch_size = training_batch_size
        self.learning_rate = learning_rate
        self.validation_fraction = validation_fraction
        self.stop_after_epochs = stop_after_epochs
        self.max_num_epochs = max_num_epochs
        self.clip_max_norm = clip_max_norm
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(
        self, X: Any, y: Any = None, *, on_epoch: Optional[OnEpoch] = None
    ) -> "JeffreysDensityEstimator":
        """Fit flow and proxy to samples.

        Args:
            X: Samples of shape `(n_samples, n_features)`, at least 3.
            y: Ignored, for scikit-learn's pipelines.
            on_epoch: Called after every epoch with its number, from 0, and the
                `JeffreysEstimator` as it stands.

        Returns:
            The object itself.

        Raises:
            ValueError: If `X` is not numeric, finite and two-dimensional, if a column
                is constant or discrete, or if `model` or `base_measure` is unknown.
        """
        self._check_model()
        build_proxy = self._energy_builder()
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=3)
        theta = torch.as_tensor(X, dtype=torch.float32)
        objective = self.objective
        with self._random_numbers(self.random_state):
            given = isinstance(self.base_measure, Distribution)
            inference = _Trainer(
                on_epoch,
                prior=self.base_measure if given else None,
                density_estimator=self.flow,
                device=self.device,
                tracker=NoTracker(),
                show_progress_bars=self.verbose,
                energy_estimator=build_proxy,
                weights=self.weights,
                objective=(
                    SharedPartitionObjective() if objective is None else objective
                ),
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Data has constant values")
                inference.append_simulations(theta, torch.zeros(len(theta), 1))
            estimator = inference.train(
                training_batch_size=self.training_batch_size,
                learning_rate=self.learning_rate,
                validation_fraction=self.validation_fraction,
                stop_after_epochs=self.stop_after_epochs,
                max_num_epochs=self.max_num_epochs,
                clip_max_norm=self.clip_max_norm,
                show_train_summary=self.verbose,
            )
            assert isinstance(estimator, JeffreysEstimator)
            self.inference_ = inference
            self.estimator_ = estimator.eval()
            self.flow_: ConditionalDensityEstimator = estimator.flow
            self.proxy_: ConditionalEnergy = estimator.proxy
            self.exponent_ = estimator.exponent
            self.history_: Dict[str, List[Any]] = {
                name: list(inference.summary[name])
                for name in ("stage", *EPOCH_METRICS)
            }
            self.log_partition_ = {
                name: self._normalise(exponent)
                for name, exponent in self._exponents.items()
            }
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Return the log density of every sample, of shape `(n_samples,)`.

        Args:
            X: Samples of shape `(n_samples, n_features)`.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        theta = torch.as_tensor(X, dtype=torch.float32)
        with torch.no_grad():
            parts = [self.log_prob(part) for part in theta.split(BATCH_SIZE)]
        return torch.cat(parts).cpu().numpy().astype(np.float64)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log density of samples, in nats.

        scikit-learn's `KernelDensity` returns the sum, its `GaussianMixture` the mean.

        Args:
            X: Samples of shape `(n_samples, n_features)`.
            y: Ignored, for scikit-learn's pipelines.
        """
        return float(self.score_samples(X).mean())

    def sample(
        self,
        n_samples: int = 1,
        random_state: Union[None, int, np.random.RandomState] = None,
    ) -> np.ndarray:
        """Draw samples of shape `(n_samples, n_features)`.

        Those of the proxy and of the refined density are samples of the flow,
        resampled by their weights and spread by Metropolis moves where the weights
        are uneven, see `RefinedPosterior`.

        Args:
            n_samples: Number of samples.
            random_state: Seed; numpy's global random numbers if not given.

        Raises:
            ValueError: If `n_samples` is below 1.
        """
        check_is_fitted(self)
        self._check_model()
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
        with self._random_numbers(random_state), torch.no_grad():
            if self.model == "flow":
                theta = torch.cat([
                    self.flow_.sample(torch.Size((num,)), self._condition)[:, 0]
                    for num in _parts(n_samples)
                ])
            else:
                theta = self.refined_posterior(self._exponents[self.model]).sample((
                    n_samples,
                ))
        return theta.cpu().numpy().astype(np.float64)

    def log_prob(self, theta: Tensor) -> Tensor:
        r"""Return the log density in terms of torch, with gradients to `theta`.

        Args:
            theta: Points of shape `(num, n_features)`.

        Returns:
            $\log p$, $\log q$ or the log density of both together, see `model`, of
            shape `(num,)`.
        """
        check_is_fitted(self)
        self._check_model()
        points = theta.to(self._condition).unsqueeze(1)
        if self.model == "flow":
            return self.flow_.log_prob(points, self._condition)[:, 0]
        log_q = self.proxy_.log_unnormalized(points, self._condition)[:, 0]
        exponent = self._exponents[self.model]
        constant = self.log_partition_[self.model].debiased
        if exponent == 1:
            return log_q - constant
        log_p = self.flow_.log_prob(points, self._condition)[:, 0]
        return log_refined(log_p, log_q, exponent) - constant

    def refined_posterior(self, exponent: Optional[float] = None) -> RefinedPosterior:
        """Return the refined density as sbi's posteriors are, with its diagnostics.

        Args:
            exponent: The exponent, `exponent_` if not given; 1 for the proxy.
        """
        check_is_fitted(self)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The passed prior has no support")
            posterior = self.inference_.build_posterior(
                sample_with="refined",
                refined_sampling_parameters={"exponent": exponent},
            )
        assert isinstance(posterior, RefinedPosterior)
        posterior.set_default_x(self._condition)
        return posterior

    @property
    def _condition(self) -> Tensor:
        """The condition that never changes, of shape `(1, 1)`."""
        return torch.zeros(1, 1, device=next(self.estimator_.parameters()).device)

    @property
    def _exponents(self) -> Dict[str, float]:
        return {"proxy": 1.0, "refined": self.exponent_}

    @torch.no_grad()
    def _normalise(self, exponent: float) -> LogPartition:
        """Return the normalising constant of the tempered density.

        Half the samples are the flow's, half the reference's, with the weights of
        `sbi_jeffreys.partition`.
        """
        num = NUM_PARTITION_SAMPLES // 2
        _, log_weights = sample_with_log_weights(
            self.flow_, self.proxy_, num, self._condition, exponent
        )
        total = from_log_weights(log_weights)
        return LogPartition(
            total.value[0], total.effective_sample_size[0], total.num_samples
        )

    def _energy_builder(self) -> EnergyBuilder:
        """Return the builder of the proxy on the base measure.

        Raises:
            ValueError: If the base measure is unknown.
        """
        base = self.base_measure
        if isinstance(base, Distribution):
            return energy_nn() if self.energy is None else self.energy
        if base not in ("gaussian", "lebesgue"):
            raise ValueError(
                "base_measure must be 'gaussian', 'lebesgue' or a distribution of "
                f"torch's, got {base!r}."
            )
        build = self.energy
        if build is None:
            build = energy_nn(base_measure="prior" if base == "gaussian" else base)

        def build_proxy(
            theta: Tensor, x: Tensor, prior: Optional[Distribution]
        ) -> ConditionalEnergy:
            return build(theta, x, gaussian_of(theta) if base == "gaussian" else None)

        return build_proxy

    def _check_model(self) -> None:
        if self.model not in ("flow", "proxy", "refined"):
            raise ValueError(
                f"model must be 'flow', 'proxy' or 'refined', got {self.model!r}."
            )

    @contextmanager
    def _random_numbers(
        self, random_state: Union[None, int, np.random.RandomState]
    ) -> Iterator[None]:
        """Seed torch, and leave its random numbers as they were."""
        seed = check_random_state(random_state).randint(2**31 - 1)
        with keeping_random_state(self.device):
            torch.manual_seed(seed)
            yield


def gaussian_of(theta: Tensor) -> MultivariateNormal:
    """Return the Gaussian with the mean and covariance of samples."""
    covariance = torch.atleast_2d(torch.cov(theta.double().T))
    # Fewer samples than dimensions, or collinear ones, make it singular.
    ridge = 1e-4 * covariance.diagonal().clamp_min(1e-30).diag()
    return MultivariateNormal(
        theta.mean(0), (covariance + ridge).to(theta), validate_args=False
    )


def _parts(total: int) -> List[int]:
    """Return numbers of at most `BATCH_SIZE` that add up to `total`."""
    full, rest = divmod(total, BATCH_SIZE)
    return [BATCH_SIZE] * full + [rest] * (rest > 0)
