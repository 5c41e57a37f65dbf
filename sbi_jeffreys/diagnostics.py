r"""What two models of one posterior tell that one cannot: do they agree, and where.

`compare_models` measures the divergences between flow and proxy on simulations that
neither was fitted to. `check_fit` asks whether the posterior at one observation can be
trusted, with one test for each way in which it may not:

============  ==========================================  ==========================
test          statistic                                   finds
============  ==========================================  ==========================
novelty       distance of the observation to its nearest  simulators and priors that
              simulation                                  cannot have produced it
embedding     the same of its embedding, where there is   likewise, for images, time
              an embedding network                        series and sets
disagreement  Jeffreys divergence of flow and proxy at    parameters that the few
              the observation                             simulations near it leave
                                                          to chance
calibration   coverage of the flow's credible regions     overconfidence, everywhere
              over held-out simulations
============  ==========================================  ==========================

The first three compare the observation with simulations that play its part. If it is
one of them, its rank among them is uniform, so that

.. math:: p = \frac{1 + \#\{j : t_j \ge t(x_o)\}}{n + 1}

is a p-value in finite samples, whatever the networks are worth [1]. The levels of all
tests add up to the rate of false alarms that was asked for (Bonferroni).

No check of this kind finds a simulator that is wrong and yet produces what was
observed.

[1] V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World",
Springer 2005.
"""

from dataclasses import dataclass
from math import ceil
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from sbi.neural_nets.estimators.shape_handling import reshape_to_batch_event
from sbi.utils.user_input_checks import process_x
from scipy.stats import kstest, spearmanr
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from sbi_jeffreys.estimator import JeffreysEstimator
from sbi_jeffreys.flow import rsample_and_log_prob
from sbi_jeffreys.partition import from_log_weights, log_mixture
from sbi_jeffreys.persistence import keeping_random_state
from sbi_jeffreys.trainer import JeffreysNPE

#: Disagreements below this are no cause for distrust, in nats: two Gaussians of one
#: width that lie a third of their standard deviation apart.
MIN_DISAGREEMENT = 0.1

#: Disagreements above this are not called agreement, in nats: two Gaussians of one
#: width that lie their standard deviation apart.
MAX_AGREEMENT = 1.0

#: Errors of the coverage below this are no cause for distrust.
MIN_COVERAGE_ERROR = 0.1

# Parameters of which densities are evaluated at once, which bounds the memory.
_BATCH_SIZE = 50_000
# Simulations that the observation is compared with; more change nothing.
_MAX_REFERENCE = 2_000
# Simulations that miss the same values as the observation, with which p-values reach
# the level of one of four tests at the default rate of false alarms.
_MIN_ALIKE = 80
# Features are reduced to so many principal components and what these leave.
_MAX_FEATURES = 50


@dataclass(frozen=True)
class ModelComparison:
    r"""Flow $p$ and proxy $q$ on held-out simulations, one value for each of them.

    Attributes:
        theta: Parameters, of shape `(num, *input_shape)`.
        x: Simulation outputs, of shape `(num, *condition_shape)`.
        from_prior: Whether the parameters were drawn from the prior. Losses and
            levels of others, from a proposal, say nothing.
        flow_loss: $-\log p(\theta \mid x)$ in nats.
        proxy_loss: $-\log q(\theta \mid x)$ in nats.
        flow_to_proxy: $\mathrm{KL}(p(\cdot \mid x) \Vert q(\cdot \mid x))$ in nats.
        proxy_to_flow: $\mathrm{KL}(q(\cdot \mid x) \Vert p(\cdot \mid x))$ in nats.
        relative_ess: Effective sample size of the flow's samples, weighted by the
            proxy, as a share of their number.
        levels: Mass of the smallest credible region of the flow that holds the
            parameters, between 0 and 1. Uniform if the flow is calibrated.
    """

    theta: Tensor
    x: Tensor
    from_prior: Tensor
    flow_loss: Tensor
    proxy_loss: Tensor
    flow_to_proxy: Tensor
    proxy_to_flow: Tensor
    relative_ess: Tensor
    levels: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def disagreement(self) -> Tensor:
        r"""Jeffreys divergence of the models at every simulation, in nats."""
        return self.flow_to_proxy + self.proxy_to_flow

    def coverage(self, mass: float) -> float:
        """Return how many parameters lie in their credible regions, as a share.

        Args:
            mass: Mass of the credible regions, between 0 and 1.
        """
        return (self.levels[self.from_prior] <= mass).double().mean().item()

    def calibration_test(self) -> Tuple[float, float]:
        """Return the largest error of the coverage and its p-value, by Kolmogorov's
        test of uniform levels; 0 and 1 without simulations from the prior."""
        levels = self.levels[self.from_prior]
        if not len(levels):
            return 0.0, 1.0
        result = kstest(levels.double().numpy(), "uniform")
        return float(result.statistic), float(result.pvalue)

    def disagreement_by_feature(self) -> Dict[str, float]:
        r"""Return the features with which the disagreement grows.

        Returns:
            Spearman's rank correlation with every column of $\theta$ and $x$ and with
            its distance from the median, of those whose p-value is below 0.01 over the
            number of columns, the strongest first. Of outputs that are missing at some
            simulations, as padding, the others count.
        """
        columns: Dict[str, Tensor] = {}
        for name, values in (("theta", self.theta), ("x", self.x)):
            for i, column in enumerate(values.flatten(1).T):
                columns[f"{name}[{i}]"] = column
                distance = (column - column[column.isfinite()].median()).abs()
                columns[f"|{name}[{i}] - median|"] = distance
        found = {}
        for name, column in columns.items():
            is_there = column.isfinite()
            column, disagreement = column[is_there], self.disagreement[is_there]
            if len(column) < 10 or (column == column[0]).all():
                continue
            result = spearmanr(column.numpy(), disagreement.numpy())
            if result.pvalue < 0.01 / len(columns):  # type: ignore[attr-defined]
                found[name] = float(result.statistic)  # type: ignore[attr-defined]
        return dict(sorted(found.items(), key=lambda item: -abs(item[1])))

    def __str__(self) -> str:
        lines = [f"Flow and proxy on {len(self)} held-out simulations, in nats:"]
        prior = self.from_prior
        difference = (self.flow_loss - self.proxy_loss)[prior]
        for label, values in (
            ("-log p(theta|x), the flow", self.flow_loss[prior]),
            ("-log q(theta|x), the proxy", self.proxy_loss[prior]),
            ("  their difference (positive: the proxy is better)", difference),
            ("KL(p||q), what the flow has and the proxy has not", self.flow_to_proxy),
            ("KL(q||p), what the proxy has and the flow has not", self.proxy_to_flow),
        ):
            lines.append(f"  {label}: {_mean_and_error(values)}")
        low, median = self.relative_ess.quantile(torch.tensor([0.05, 0.5])).tolist()
        lines.append(
            f"Of the flow's samples the proxy's weights leave {100 * median:.0f} % at "
            f"the median observation and {100 * low:.0f} % at the worst in twenty."
        )
        if prior.any():
            error, p_value = self.calibration_test()
            lines.append(
                f"The flow's 90 % regions hold {100 * self.coverage(0.9):.0f} % of the "
                f"parameters, its 50 % regions {100 * self.coverage(0.5):.0f} % "
                f"(largest error {100 * error:.0f} %, p = {p_value:.2g})."
            )
        where = [
            f"{name} (rank correlation {value:+.2f})"
            for name, value in list(self.disagreement_by_feature().items())[:3]
        ]
        lines.append(
            f"They disagree more with: {', '.join(where)}."
            if where
            else "Where they disagree depends on no single parameter or feature."
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class FitCheck:
    r"""Whether the posterior at an observation can be trusted, and why.

    Attributes:
        trusted: Whether no test objects.
        text: The verdict in words, also by `str`.
        objections: Names of the tests that object.
        p_values: p-value of every test, see `sbi_jeffreys.diagnostics`.
        level: p-value below which a test objects: the rate of false alarms divided by
            the number of tests.
        flow_to_proxy: $\mathrm{KL}(p \Vert q)$ at the observation, in nats.
        proxy_to_flow: $\mathrm{KL}(q \Vert p)$ at the observation, in nats.
        relative_ess: Effective sample size of the flow's samples, weighted by the
            proxy, as a share of their number.
        coverage_error: Largest error of the flow's coverage over held-out simulations.
        num_held_out: Number of held-out simulations.
    """

    trusted: bool
    text: str
    objections: Tuple[str, ...]
    p_values: Dict[str, float]
    level: float
    flow_to_proxy: float
    proxy_to_flow: float
    relative_ess: float
    coverage_error: float
    num_held_out: int

    def __str__(self) -> str:
        return self.text


def compare_models(
    inference: JeffreysNPE,
    held_out: Optional[Tuple[Tensor, Tensor]] = None,
    num_samples: int = 500,
) -> ModelComparison:
    r"""Compare flow and proxy on simulations that neither was fitted to.

    .. math::
        \mathrm{KL}(p \Vert q) &= \mathbb{E}_p[\log p - \log q] \\
        \mathrm{KL}(q \Vert p) &= \mathbb{E}_q[\log q - \log p]

    at every $x$, the second by importance sampling from the flow and the proxy's base
    measure together. Samples of the flow beyond the prior's support are charged as in
    training, so that the divergence stays finite.

    Args:
        inference: The trained `JeffreysNPE`.
        held_out: Parameters and outputs of further simulations from the prior. The
            validation simulations if not given: with these it was chosen when to stop,
            which flow to keep, how wide it is and what the proxy counts, so that
            losses and coverage on them are better than on others.
        num_samples: Number of samples of either kind for every simulation. Levels lie
            on a grid of as many points: a few dozen are enough for the divergences, but
            too few for the p-value of the calibration.

    Returns:
        The comparison; `print` it for a report.

    Raises:
        TypeError: If `inference` is no `JeffreysNPE`, or `held_out` no two tensors.
        ValueError: If `inference` has not been trained, or not on the simulations it
            holds, or if `held_out` are not as many parameters as outputs, or of other
            shapes than the networks were trained with, or are not finite, but for
            outputs where such were trained on. If `num_samples` is below 1. Without
            `held_out` also if it was loaded from a file without simulations.
    """
    estimator = _trained(inference)
    _check_num_samples(num_samples)
    if held_out is None:
        theta, x, from_prior = _simulations(inference)
        index = inference.val_indices
        theta, x, from_prior = theta[index], x[index], from_prior[index]
    else:
        theta, x = _checked_pair(held_out, inference, estimator)
        from_prior = torch.ones(len(theta), dtype=torch.bool)
    if len(x) == 0:
        raise ValueError("There are no held-out simulations to compare the models on.")
    parts = _compare(estimator, x, num_samples, theta)
    return ModelComparison(theta.cpu(), x.cpu(), from_prior.cpu(), **parts)


def check_fit(
    inference: JeffreysNPE,
    x_o: Tensor,
    comparison: Optional[ModelComparison] = None,
    false_alarm_rate: float = 0.05,
    num_samples: int = 500,
) -> FitCheck:
    r"""Say whether the posterior at an observation can be trusted.

    Runs the tests of `sbi_jeffreys.diagnostics`. An observation that the simulator
    produced, of a calibrated flow, is objected to with a probability of at most
    `false_alarm_rate`. Its samples have a seed of their own: the same networks, on one
    machine, say the same of an observation again, and the caller's random numbers are
    left as they are. Those of `compare_models` are the caller's.

    Example:
    --------

    ::

        print(check_fit(inference, x_o))

        comparison = compare_models(inference)  # once, for many observations
        checks = [check_fit(inference, x, comparison) for x in xs]

    Args:
        inference: The trained `JeffreysNPE`.
        x_o: One observation, of shape `condition_shape` or `(1, *condition_shape)`.
        comparison: What `compare_models` returned. Its number of held-out simulations
            bounds what the tests can say: fewer than 59 leave the disagreement
            untested at the default rate.
        false_alarm_rate: Probability of objecting to a good fit.
        num_samples: Number of samples of either model at the observation.

    Returns:
        The verdict; `print` it.

    Raises:
        TypeError: If `inference` is no `JeffreysNPE`, or `comparison` not what
            `compare_models` returns.
        ValueError: If `x_o` is not one observation, if `false_alarm_rate` is not
            between 0 and 1, if `num_samples` is below 1, or if `inference` has not
            been trained, not on the simulations it holds, or was loaded from a file
            without simulations.
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(
            f"false_alarm_rate must be between 0 and 1, got {false_alarm_rate}."
        )
    _check_num_samples(num_samples)
    estimator = _trained(inference)
    if not isinstance(comparison, (ModelComparison, type(None))):
        raise TypeError(
            "comparison must be what compare_models returned, got "
            f"{type(comparison).__name__}."
        )
    x_o = reshape_to_batch_event(process_x(x_o), estimator.condition_shape)
    if len(x_o) != 1:
        raise ValueError(
            f"One observation is expected, got {len(x_o)}. Check them one by one, with "
            "the same comparison=compare_models(inference)."
        )
    with keeping_random_state(inference._device):
        # Priors of scipy draw from numpy.
        torch.manual_seed(0)
        np.random.seed(0)
        if comparison is None:
            comparison = compare_models(inference, num_samples=num_samples)
        at_x_o = _compare(estimator, x_o, num_samples)
    disagreement = (at_x_o["flow_to_proxy"] + at_x_o["proxy_to_flow"]).item()
    coverage_error, p_calibration = comparison.calibration_test()
    p_values = {
        **_novelty_tests(estimator, inference, comparison, x_o),
        "disagreement": _rank_p_value(comparison.disagreement, disagreement),
        "calibration": p_calibration,
    }
    level = false_alarm_rate / len(p_values)
    objections = [name for name, p_value in p_values.items() if p_value <= level + 1e-9]
    for name, value, least in (
        ("disagreement", disagreement, MIN_DISAGREEMENT),
        ("calibration", coverage_error, MIN_COVERAGE_ERROR),
    ):
        if name in objections and value < least:
            objections.remove(name)
    relative_ess = at_x_o["relative_ess"].item()
    return FitCheck(
        trusted=not objections,
        text=_verdict(
            objections, p_values, level, disagreement, relative_ess, comparison
        ),
        objections=tuple(objections),
        p_values=p_values,
        level=level,
        flow_to_proxy=at_x_o["flow_to_proxy"].item(),
        proxy_to_flow=at_x_o["proxy_to_flow"].item(),
        relative_ess=relative_ess,
        coverage_error=coverage_error,
        num_held_out=len(comparison),
    )


def _trained(inference: JeffreysNPE) -> JeffreysEstimator:
    if not isinstance(inference, JeffreysNPE):
        raise TypeError(
            "inference must be the JeffreysNPE that was trained, whose proxy and "
            f"simulations are needed; got {type(inference).__name__}."
        )
    estimator = inference._neural_net
    if not isinstance(estimator, JeffreysEstimator):
        raise ValueError("There is no trained network yet: call .train() first.")
    return estimator.eval()


def _simulations(inference: JeffreysNPE) -> Tuple[Tensor, Tensor, Tensor]:
    """Return the simulations of the last training, and which are from the prior."""
    if not hasattr(inference, "train_indices"):
        raise ValueError(
            "The simulations that the networks were trained on are not here: this "
            "JeffreysNPE was loaded from a file without them. Load one that was saved "
            "with save(path, simulations=True). compare_models, not check_fit, can do "
            "without: compare_models(inference, held_out=(theta, x))."
        )
    num_used = len(inference.train_indices) + len(inference.val_indices)
    # `discard_prior_samples` leaves the first round out.
    theta, x, masks = inference.get_simulations(inference._starting_round)
    if len(theta) == num_used:
        return theta, x, masks.flatten().bool()
    num = sum(map(len, inference._theta_roundwise))
    raise ValueError(
        f"The last training used {num_used} simulations, but there are {num} now. "
        "Train on all of them first."
    )


def _check_num_samples(num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")


def _checked_pair(
    held_out: Tuple[Tensor, Tensor],
    inference: JeffreysNPE,
    estimator: JeffreysEstimator,
) -> Tuple[Tensor, Tensor]:
    """Return parameters and outputs, if they are such as the networks take."""
    parts = tuple(held_out) if isinstance(held_out, (tuple, list)) else (held_out,)
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        given = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"held_out must be two tensors, (theta, x); got ({given}).")
    theta, x = parts
    shapes = estimator.input_shape, estimator.condition_shape
    if theta.shape[1:] != shapes[0] or x.shape[1:] != shapes[1]:
        expected = " and ".join(str(("num", *shape)) for shape in shapes)
        raise ValueError(
            f"held_out must be parameters and outputs of shapes {expected}, got "
            f"{tuple(theta.shape)} and {tuple(x.shape)}."
        )
    if len(theta) != len(x):
        raise ValueError(
            "held_out must hold as many parameters as outputs, got "
            f"{len(theta)} and {len(x)}."
        )
    # Networks may take a missing output for an average one, without a word.
    for name, part in (("theta", theta), ("x", x)):
        bad = int((~part.isfinite().flatten(1).all(1)).sum())
        if bad and not (name == "x" and _may_be_missing(inference)):
            raise ValueError(
                f"{name} of held_out has NaN or infinity in {bad} of {len(part)} rows, "
                "which the simulations of the training had not. Leave those "
                "simulations out of both, theta and x."
            )
    return theta.to(torch.float32), x.to(torch.float32)


def _may_be_missing(inference: JeffreysNPE) -> bool:
    """Return whether outputs were missing in training; a file does not tell."""
    trained_on = inference._x_roundwise
    return not trained_on or not all(part.isfinite().all() for part in trained_on)


@torch.no_grad()
def _compare(
    estimator: JeffreysEstimator,
    x: Tensor,
    num_samples: int,
    theta: Optional[Tensor] = None,
) -> Dict[str, Tensor]:
    """Return the fields of a `ModelComparison`; without parameters those of x only."""
    parts: List[Dict[str, Tensor]] = []
    size = max(1, _BATCH_SIZE // num_samples)
    device = next(estimator.parameters()).device
    thetas = [None] * len(x) if theta is None else theta.split(size)
    for x_batch, theta_batch in zip(x.split(size), thetas, strict=False):
        if theta_batch is not None:
            theta_batch = theta_batch.to(device)
        parts.append(
            _compare_batch(estimator, x_batch.to(device), num_samples, theta_batch)
        )
    return {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}


def _compare_batch(
    estimator: JeffreysEstimator,
    x: Tensor,
    num_samples: int,
    theta: Optional[Tensor],
) -> Dict[str, Tensor]:
    flow, proxy, base = estimator.flow, estimator.proxy, estimator.proxy.base
    theta_flow, log_p = rsample_and_log_prob(flow, num_samples, x)
    theta_base = base.sample(num_samples, len(x))
    points = torch.cat((theta_flow, theta_base))
    log_p = torch.cat((log_p, flow.log_prob(theta_base, x)))
    f, log_b = proxy(points, x), base.log_prob(points)
    log_q = log_b + f
    log_m = log_mixture(
        log_p, base.reference_log_prob(points), num_samples, num_samples
    )
    log_w = log_q - log_m
    partition = from_log_weights(log_w)
    log_z = partition.value
    # Of the energy beyond the support nothing is known: the proxy does not count it.
    inside = ~torch.isneginf(log_b[:num_samples])
    extended = base.extended_log_prob(theta_flow) + f[:num_samples].where(inside, 0.0)
    # What weighs nothing adds nothing, also where the flow has no density at all.
    of_proxy = torch.softmax(log_w, 0)
    ratio = torch.where(of_proxy > 0, log_q - log_p, 0.0)
    weights = from_log_weights((log_q - log_p)[:num_samples])
    result = {
        "flow_to_proxy": (log_p[:num_samples] - extended).mean(0) + log_z,
        "proxy_to_flow": (of_proxy * ratio).sum(0) - log_z,
        "relative_ess": weights.effective_sample_size / num_samples,
    }
    if theta is not None:
        log_p_theta = flow.log_prob(theta.unsqueeze(0), x)
        log_q_theta = base.extended_log_prob(theta) + proxy(theta[None], x)[0]
        # Credible regions are those of the posterior: within the prior's support.
        higher = ((log_p[:num_samples] > log_p_theta) & inside).sum(0)
        result.update(
            flow_loss=-log_p_theta[0],
            proxy_loss=partition.debiased - log_q_theta,
            levels=(higher + 0.5) / (inside.sum(0) + 1),
        )
    return result


def _novelty_tests(
    estimator: JeffreysEstimator,
    inference: JeffreysNPE,
    comparison: ModelComparison,
    x_o: Tensor,
) -> Dict[str, float]:
    """Return the p-values of the observation's distance to the simulations."""
    _, x, _ = _simulations(inference)
    if len(x) > _MAX_REFERENCE:
        generator = torch.Generator().manual_seed(0)
        x = x[torch.randperm(len(x), generator=generator)[:_MAX_REFERENCE]]
    p_values = {"novelty": _novelty(torch.cat((x.cpu(), x_o.cpu())))}
    embedding = estimator.embedding_net
    if embedding is not None and any(True for _ in embedding.parameters()):
        # The embedding has learned from the training simulations: only held-out ones
        # are as new to it as the observation.
        device = next(estimator.parameters()).device
        _, x, _ = _simulations(inference)
        reference = x[inference.train_indices[:_MAX_REFERENCE]]
        with torch.no_grad():
            candidates, reference = (
                embedding(part.to(device))
                for part in (torch.cat((comparison.x.cpu(), x_o.cpu())), reference)
            )
        p_values["embedding"] = _novelty(candidates, reference)
    return p_values


def _novelty(candidates: Tensor, reference: Optional[Tensor] = None) -> float:
    r"""Return the p-value of the last candidate's distance to its nearest neighbour.

    The distance is that of Mahalanobis with a covariance shrunk after Ledoit and Wolf,
    of features that are centred and scaled by median and quartiles. Beyond five of
    these standard deviations the logarithm keeps a few outliers among the simulations
    from hiding all the others. Of 1 to 60 neighbours the nearest found most: the
    further ones see less of a curved manifold.

    Values that are missing, as NaN in place of trials that there were not, are taken
    as the median of their feature: of all values that says least about how far away
    the others are. How many are missing is a feature of its own. As whole simulations
    are further apart than those filled in, the observation is compared with those that
    miss the same values, where there are enough of them.

    Args:
        candidates: Simulations and last the observation, `(num, *condition_shape)`.
            All are treated alike, or the rank would not be uniform.
        reference: Simulations among which the neighbours are looked for; the other
            candidates if not given.
    """
    parts = (candidates,) if reference is None else (candidates, reference)
    points = [part.detach().cpu().double().flatten(1) for part in parts]
    missing = [~part.isfinite() for part in points]
    if any(bool(part.any()) for part in missing):
        points = [
            torch.cat((p.where(~m, torch.nan), m.double().sum(1, keepdim=True)), 1)
            for p, m in zip(points, missing, strict=True)
        ]
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)
    # A feature that no simulation has is at zero.
    low, median, high = points[-1].nanquantile(levels, 0).nan_to_num(0.0)
    points = [part.where(~part.isnan(), median) for part in points]
    scale = (high - low) / 1.349
    spread = points[-1].std(0)
    scale = torch.where(scale > 0, scale, spread)
    # A feature that was always the same is new when it differs at all.
    scale = torch.where(scale > 0, scale, 1e-6 * median.abs().clamp_min(1e-6))
    points = [_compress((part - median) / scale) for part in points]
    if points[0].shape[1] > _MAX_FEATURES:
        points = _principal_components(points)
    covariance = torch.as_tensor(ledoit_wolf(points[-1].numpy())[0])
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    least = eigenvalues[-1].clamp_min(1e-30) * 1e-12
    whiten = eigenvectors / eigenvalues.clamp_min(least).sqrt()
    distances = torch.cdist(points[0] @ whiten, points[-1] @ whiten)
    if reference is None:
        distances.fill_diagonal_(torch.inf)
    nearest = distances.min(1).values
    alike = (missing[0][:-1] == missing[0][-1]).all(1)
    if alike.sum() < _MIN_ALIKE:
        alike[:] = True
    return _rank_p_value(nearest[:-1][alike], nearest[-1].item())


def _compress(z: Tensor, linear: float = 5.0) -> Tensor:
    beyond = (z.abs() - linear).clamp_min(0)
    return z.clamp(-linear, linear) + z.sign() * beyond.log1p()


def _principal_components(points: List[Tensor]) -> List[Tensor]:
    """Return the leading components of all, and the logarithm of what they leave."""
    mean = points[-1].mean(0)
    centred = points[-1] - mean
    # By subspace iteration: images have too many features for a full decomposition.
    components = torch.randn(
        centred.shape[1],
        max(1, min(_MAX_FEATURES, len(centred) // 5)),
        dtype=centred.dtype,
        generator=torch.Generator().manual_seed(0),
    )
    for _ in range(4):
        components, _ = torch.linalg.qr(centred.T @ (centred @ components))
    parts = []
    for part in points:
        scores = (part - mean) @ components
        rest = (part - mean - scores @ components.T).norm(dim=1, keepdim=True)
        parts.append(torch.cat((scores, rest.clamp_min(1e-12).log()), 1))
    return parts


def _rank_p_value(values: Tensor, observed: float) -> float:
    return (1 + (values >= observed).sum().item()) / (len(values) + 1)


def _mean_and_error(values: Tensor) -> str:
    if len(values) < 2:
        return "unknown, too few simulations from the prior"
    error = values.std() / len(values) ** 0.5
    return f"{values.mean():.3f} ± {error:.3f}"


def _verdict(
    objections: List[str],
    p_values: Dict[str, float],
    level: float,
    disagreement: float,
    relative_ess: float,
    comparison: ModelComparison,
) -> str:
    typical = comparison.disagreement.median().item()
    share_90, share_50 = (f"{100 * comparison.coverage(m):.0f}" for m in (0.9, 0.5))
    said = {
        "novelty": (
            "the observation is unlike the simulations: "
            f"{_rank(p_values.get('novelty', 1))} lie as far from their nearest "
            "neighbour. The networks have not learned what follows from such an "
            "observation. Check its units and preprocessing, then whether simulator "
            "and prior can produce it at all."
        ),
        "embedding": (
            "the embedding of the observation is unlike those of the simulations: "
            f"{_rank(p_values.get('embedding', 1))} lie as far from their nearest "
            "neighbour. Check its preprocessing, and whether simulator and prior can "
            "produce it."
        ),
        "disagreement": (
            f"flow and proxy disagree by {disagreement:.2g} nats, against "
            f"{typical:.2g} at the median simulation "
            f"({_rank(p_values['disagreement'])} are as bad). At least one of them is "
            "wrong here. Simulate more, best near this observation: a second round "
            "with this posterior as the proposal."
        ),
        "calibration": (
            f"the flow's 90 % credible regions hold {share_90} % of held-out "
            f"parameters and its 50 % regions {share_50} %, over all observations. "
            "Simulate more, or average an ensemble."
        ),
    }
    if objections:
        lines = ["Do not trust the posterior at this observation."]
        lines += [f"- {name.capitalize()}: {said[name]}" for name in objections]
    else:
        found = max(disagreement, 0)  # an estimate, which may be below zero
        numbers = f"{found:.2g} nats; {typical:.2g} at the median simulation"
        lines = [
            "Nothing speaks against the posterior at this observation: it is like the "
            "simulations, and flow and proxy "
            # A test that finds nothing unusual does not make a large difference small.
            + (
                f"differ no more than at other simulations (by {numbers})."
                if max(found, typical) > MAX_AGREEMENT
                else f"agree (to {numbers})."
            )
        ]
        if comparison.from_prior.any():
            lines.append(
                f"The flow's 90 % credible regions hold {share_90} % of held-out "
                f"parameters, its 50 % regions {share_50} %."
            )
    if 1 / (len(comparison) + 1) > level + 1e-9:
        lines.append(
            f"Too few held-out simulations ({len(comparison)}) to judge the "
            f"disagreement: {ceil(1 / level - 1e-9) - 1} are needed, as "
            "comparison=compare_models(inference, held_out=(theta, x))."
        )
    elif typical > MAX_AGREEMENT:
        lines.append(
            "The proxy is a poor witness, whatever it says here: it differs from the "
            f"flow by {typical:.2g} nats at the median simulation."
        )
    shown = ", ".join(f"{name} {p:.2g}" for name, p in p_values.items())
    lines.append(
        f"p-values: {shown}; each objects below {level:.2g}, to a disagreement from "
        f"{MIN_DISAGREEMENT} nats on, to a coverage that errs by "
        f"{100 * MIN_COVERAGE_ERROR:.0f} % or more. The proxy's weights leave "
        f"{100 * relative_ess:.0f} % of the flow's samples. A wrong simulator that "
        "reproduces the observation is not found by any of these tests."
    )
    return "\n".join(lines)


def _rank(p_value: float) -> str:
    return f"{100 * p_value:.1f} % of simulations"
