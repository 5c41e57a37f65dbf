r"""Surrogates of the likelihood, which the proxy takes in as factors.

.. math:: \ell_k(x \mid \theta) \approx p(x \mid \theta), \qquad
    \min \mathbb{E}_\pi[-\log \ell_k(x \mid \theta)]

A simulation tells more of the likelihood than of the posterior: it is one draw of all
its outputs, given parameters that are known. Where the outputs are noise about a smooth
function of the parameters, a surrogate of the likelihood is near the truth after few
simulations; where they are not, or too many, it is poor. How far each is to be followed
is therefore weighed on validation simulations, see `sbi_jeffreys.pooled_energy`.

The outputs enter by their standard or their normal scores, whichever of the two
`sbi_jeffreys.output_scales` finds to be a smooth function of the parameters with noise.
The Jacobian depends on $x$ alone and cancels in the posterior, as do all other factors
of $x$ alone. Surrogates are proposal free: parameters may come from any proposal [1].

[1] G. Papamakarios, D. Sterratt, I. Murray, "Sequential Neural Likelihood: Fast
Likelihood-free Inference with Autoregressive Flows", AISTATS 2019.
"""

import math
from typing import List, Optional, Sequence, Tuple, cast

import torch
from sbi.neural_nets import likelihood_nn
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn
from torch.distributions import Categorical, StudentT
from torch.nn import functional as F

from sbi_jeffreys.coordinates import ResidualCoordinates
from sbi_jeffreys.features import (
    MAX_SCORE,
    MAX_SIMULATIONS,
    Features,
    is_continuous,
    num_values,
)
from sbi_jeffreys.logistic import LogisticRegressions
from sbi_jeffreys.output_scales import prefers_normal_scores

# With more outputs a surrogate of the likelihood is no longer cheap.
MAX_OUTPUTS = 200
# With more, the pairs of them are.
MAX_CORRELATED = 32
# Width of the two hidden layers.
HIDDEN_FEATURES = 64
# Bound of the logarithm of the scales, in units of the residuals.
MAX_LOG_SCALE = 6.0
# Degrees of freedom that the tails of the outputs begin with.
INITIAL_DEGREES_OF_FREEDOM = 8.0
# Of the independent outputs' likelihood in those of the other surrogates.
SHARE_OF_BROAD = 0.01
# Log likelihoods are bounded: those of parameters far from all simulations are guesses.
MAX_LOG_LIKELIHOOD = 1e4


class SurrogateLikelihoods(nn.Module):
    r"""Several surrogates of the likelihood of the same outputs.

    They err in different ways, and what they have in common is more often true: one
    with independent outputs about a smooth function, the same one with dropout, and,
    where there are two continuous outputs or more, one whose outputs are correlated,
    as far as the parameters say, and sbi's masked autoregressive flow. A flow may find
    one simulation of a hundred all but impossible, and a pool with it: therefore each
    is mixed with a little of the first, a defensive mixture [1].

    [1] T. Hesterberg, "Weighted Average Importance Sampling and Defensive Mixture
    Distributions", Technometrics 37, 1995.

    Args:
        theta: Parameters of shape `(num_simulations, num_parameters)`.
        x: Simulation outputs of shape `(num_simulations, num_outputs)`.
        coordinates: Coordinates of the parameters, for their standardisation.
        used: Indices of the outputs that they are surrogates for; all if not given.
        dropout: Dropout probability of the surrogates that have it.
    """

    def __init__(
        self,
        theta: Tensor,
        x: Tensor,
        coordinates: ResidualCoordinates,
        used: Optional[Tensor] = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.register_buffer("used", used)
        theta, x = theta[:MAX_SIMULATIONS], self._used(x[:MAX_SIMULATIONS])
        self.coordinates = coordinates
        z = _saturate(coordinates.standardize(theta))
        self.outputs = Outputs(x, z)
        # Scores are spread, as those that members learn from.
        y, categories = self.outputs(x)
        values = cast(Tensor, self.outputs.values)
        features = Features(z)
        of_scores = ResidualCoordinates(y, z, features) if y.shape[1] else None
        logistic = LogisticRegressions(features, z, categories, values.shape[1])
        members: List[nn.Module] = [
            IndependentLikelihood(
                features, of_scores, logistic, self.outputs, probability
            )
            for probability in (0.0, dropout)
        ]
        if of_scores is not None and 1 < of_scores.numel <= MAX_CORRELATED:
            correlated = CorrelatedLikelihood(
                features, of_scores, logistic, self.outputs, dropout
            )
            members.append(correlated)
        if y.shape[1] > 1:
            members.append(FlowLikelihood(z, y))
        self.members = nn.ModuleList(members)

    def __len__(self) -> int:
        return len(self.members)

    def forward(
        self, theta: Tensor, x: Tensor, which: Optional[Sequence[int]] = None
    ) -> Tensor:
        r"""Return $\log \ell_k(x \mid \theta)$, up to a constant for every $x$.

        All but the first are mixed with a hundredth of that, $0.99 \, \ell_k + 0.01 \,
        \ell_0$, whose tails are heavy.

        Args:
            theta: Parameters of shape `(sample_dim, batch_dim, num_parameters)`.
            x: Simulation outputs of shape `(batch_dim, num_outputs)`.
            which: Indices of the surrogates; all if not given.

        Returns:
            Of shape `(len(which), sample_dim, batch_dim)`.
        """
        which = range(len(self)) if which is None else which
        z, y, categories = self._scores(theta, x)
        broad = cast(IndependentLikelihood, self.members[0])
        of_scores, of_categories = broad.parts(z, y, categories)
        of_broad = bounded(of_scores + of_categories)
        log_likelihoods = []
        for k in which:
            if k == 0:
                log_likelihoods.append(of_broad)
                continue
            member, floor = self.members[k], of_broad
            if isinstance(member, FlowLikelihood):
                # A density of the scores themselves, not of their whitening.
                assert broad.coordinates is not None
                floor = bounded(of_scores + broad.coordinates.log_abs_det(y))
            log_likelihoods.append(
                torch.logaddexp(
                    bounded(member(z, y, categories)) + math.log1p(-SHARE_OF_BROAD),
                    floor + math.log(SHARE_OF_BROAD),
                )
            )
        return torch.stack(log_likelihoods)

    def losses(self, theta: Tensor, x: Tensor, which: Sequence[int]) -> Tensor:
        r"""Return $-\log \ell_k(x \mid \theta)$ of shape `(len(which), batch_dim)`.

        They are those of the surrogates by themselves, from which these learn. In
        training, outputs on a lattice are spread over its cells.

        Args:
            theta: Parameters of shape `(batch_dim, num_parameters)`.
            x: Simulation outputs of shape `(batch_dim, num_outputs)`.
            which: Indices of the surrogates.
        """
        z, y, categories = self._scores(theta, x)
        return -torch.stack([self.members[k](z[None], y, categories)[0] for k in which])

    @torch.no_grad()
    def sample(self, theta: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        r"""Draw outputs that simulations with these parameters might have had.

        .. math:: x' \sim \textstyle\sum_k w_k \, \ell_k(x' \mid \theta) / \sum_k w_k

        They are those of the surrogates by themselves, as `losses` are. What one does
        not know of an output is left as it was: where it is missing, or none that they
        are surrogates for.

        Args:
            theta: Parameters of shape `(batch_dim, num_parameters)`.
            x: Simulation outputs of them, of shape `(batch_dim, num_outputs)`.
            weights: Of the surrogates, of shape `(len(self),)`, not all of them zero.

        Returns:
            Of the shape of `x`.
        """
        z = _saturate(self.coordinates.standardize(theta))
        drawn = x.clone()
        which = torch.multinomial(weights, len(x), replacement=True)
        used = cast(Optional[Tensor], self.used)
        columns = torch.arange(x.shape[1]).to(x.device) if used is None else used
        for k, member in enumerate(self.members):
            rows = (which == k).nonzero().flatten()
            if len(rows) > 0:
                y, categories = member.sample(z[rows])  # type: ignore[operator]
                of_member = self.outputs.inverse(self._used(x[rows]), y, categories)
                drawn[rows[:, None], columns] = of_member
        return drawn

    def _scores(self, theta: Tensor, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Return standardised parameters, scores and categories."""
        z = _saturate(self.coordinates.standardize(theta))
        return z, *self.outputs(self._used(x))

    def _used(self, x: Tensor) -> Tensor:
        used = cast(Optional[Tensor], self.used)
        return x if used is None else x[:, used]


class Outputs(nn.Module):
    """Simulation outputs as a likelihood sees them: scores and categories.

    Continuous outputs have their standard or their normal scores, see
    `sbi_jeffreys.output_scales`. Counts are continuous, too, if they have many values;
    but a density of values that recur has spikes, and in training they are therefore
    spread evenly over the cells of their lattice. Outputs with few values have the
    index of the nearest of these.

    Args:
        x: Simulation outputs of shape `(num_simulations, num_outputs)`.
        z: Standardised parameters of shape `(num_simulations, num_parameters)`.
    """

    spacing: Tensor
    continuous: Tensor
    discrete: Tensor
    lowest: Tensor
    highest: Tensor
    values: Tensor
    is_normal: Tensor

    def __init__(self, x: Tensor, z: Tensor) -> None:
        super().__init__()
        x, z = x[:MAX_SIMULATIONS], z[:MAX_SIMULATIONS]
        continuous = is_continuous(x)
        self.register_buffer("continuous", continuous.nonzero().flatten())
        self.register_buffer("discrete", (~continuous).nonzero().flatten())
        spacing = torch.zeros_like(x[0], dtype=torch.float32)
        for column in self.continuous.tolist():
            spacing[column] = _lattice_spacing(x[:, column].float())
        self.register_buffer("spacing", spacing)
        known = x.isfinite()
        lowest = torch.where(known, x, torch.inf).amin(0)
        highest = torch.where(known, x, -torch.inf).amax(0)
        self.register_buffer("lowest", lowest.to(spacing))
        self.register_buffer("highest", highest.to(spacing))
        # Of spread counts: else half of the lowest cell would be beyond all scores.
        spread = self._spread(x)[:, continuous]
        # Of the largest numbers single precision may not hold what lies between.
        spread = torch.where(is_continuous(spread), spread, x[:, continuous])
        self.features = Features(spread)
        self.register_buffer("is_normal", prefers_normal_scores(z, spread))
        counts = num_values(x)[~continuous].tolist()
        values = torch.full((len(counts), max(counts, default=1) or 1), torch.inf)
        for row, column in enumerate(self.discrete.tolist()):
            values[row, 0] = 0.0  # if all are missing
            distinct = _finite(x[:, column].float()).unique()
            values[row, : len(distinct)] = distinct
        self.register_buffer("values", values.to(x.device))

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Return scores and categories.

        Args:
            x: Simulation outputs of shape `(batch_dim, num_outputs)`.

        Returns:
            Scores of shape `(batch_dim, num_continuous)`, and categories of shape
            `(batch_dim, num_discrete)`, -1 where the output is missing.
        """
        discrete = x[:, self.discrete].float()
        distance = (self.values - discrete.nan_to_num(nan=0.0).unsqueeze(-1)).abs()
        categories = distance.argmin(-1)
        categories = torch.where(discrete.isfinite(), categories, -1)
        if self.training:
            x = self._spread(x)
        x = x[:, self.continuous]
        scores = torch.where(
            self.is_normal,
            self.features.normal_scores(x),
            self.features.standard_scores(x),
        )
        return scores, categories

    def inverse(self, x: Tensor, scores: Tensor, categories: Tensor) -> Tensor:
        """Return outputs with these scores and categories.

        They are within the range of the simulations, and on the lattice of these if it
        is even.

        Args:
            x: Outputs of shape `(batch_dim, num_outputs)`, which stay where they are
                missing, and where there is no category.
            scores: Scores of shape `(batch_dim, num_continuous)`.
            categories: Categories of shape `(batch_dim, num_discrete)`, or none.

        Returns:
            Of the shape of `x`.
        """
        drawn = x.clone()
        drawn[:, self.continuous] = torch.where(
            self.is_normal,
            self.features.from_normal_scores(scores),
            self.features.from_standard_scores(scores),
        ).to(x)
        steps = ((drawn - self.lowest) / self.spacing).round()
        on_lattice = self.lowest + self.spacing * steps
        drawn = torch.where(self.spacing > 0, on_lattice.to(x), drawn)
        drawn = drawn.clamp(self.lowest, self.highest).to(x)
        if categories.shape[1]:
            values = self.values.expand(len(x), -1, -1)
            of_categories = values.gather(2, categories.unsqueeze(2)).squeeze(2)
            drawn[:, self.discrete] = of_categories.to(x)
        return torch.where(x.isfinite() & drawn.isfinite(), drawn, x)

    def _spread(self, x: Tensor) -> Tensor:
        """Return outputs that are anywhere in the cell of their lattice."""
        return x + self.spacing * (torch.rand_like(x, dtype=torch.float32) - 0.5)


class IndependentLikelihood(nn.Module):
    r"""Outputs that are independent of each other given the parameters.

    .. math:: u = W y \sim t_\nu\big(W A \varphi(z) + \mu(z), \; \sigma(z)\big)

    with the ridge regression $A$ of the scores $y$ on features of the parameters, the
    whitening $W$ of its residuals, and a network for the rest. Discrete outputs have
    the probabilities of their values, by logistic regressions and the same network.

    Args:
        features: Features of the parameters.
        coordinates: Ridge regression of the scores; none where there are no scores.
        logistic: Logistic regressions of the discrete outputs.
        outputs: What gave the scores, with the values of discrete outputs.
        dropout: Dropout probability.
    """

    def __init__(
        self,
        features: Features,
        coordinates: Optional[ResidualCoordinates],
        logistic: LogisticRegressions,
        outputs: Outputs,
        dropout: float,
    ) -> None:
        super().__init__()
        num_discrete, num_categories = outputs.values.shape
        self.features = features
        self.hidden = nn.Sequential(
            nn.Linear(features.numel, HIDDEN_FEATURES),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN_FEATURES, HIDDEN_FEATURES),
            nn.SiLU(),
            nn.Dropout(dropout),
        )
        self.coordinates = coordinates
        if coordinates is not None:
            num_scores = coordinates.numel
            self.location_and_scale = _zero_layer(HIDDEN_FEATURES, 2 * num_scores)
            tails = torch.full((num_scores,), INITIAL_DEGREES_OF_FREEDOM - 2.0)
            self.tails = nn.Parameter(tails.expm1().log())  # softplus is its inverse
        if num_discrete:
            self.logistic = logistic
            self.logits = _zero_layer(HIDDEN_FEATURES, num_discrete * num_categories)
            # Categories that an output does not have.
            self.register_buffer("impossible", outputs.values.isinf())

    def forward(self, z: Tensor, y: Tensor, categories: Tensor) -> Tensor:
        r"""Return $\log \ell$ of shape `(sample_dim, batch_dim)`.

        In training, parameters and scores must be of the same simulations.

        Args:
            z: Standardised parameters, `(sample_dim, batch_dim, num_parameters)`.
            y: Scores of shape `(batch_dim, num_scores)`.
            categories: Categories of shape `(batch_dim, num_discrete)`.
        """
        of_scores, of_categories = self.parts(z, y, categories)
        return of_scores + of_categories

    def parts(self, z: Tensor, y: Tensor, categories: Tensor) -> Tuple[Tensor, Tensor]:
        r"""Return $\log \ell$ of the scores and of the categories, as `forward`."""
        features = self.features(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        hidden = self.hidden(features)
        of_scores = of_categories = hidden.new_zeros(z.shape[:2])
        if self.coordinates is not None:
            of_scores = self._of_scores(features, hidden, y)
        if categories.shape[1]:
            of_categories = self._of_categories(features, hidden, categories)
        return of_scores, of_categories

    def sample(self, z: Tensor) -> Tuple[Tensor, Tensor]:
        """Draw scores and categories, as `Outputs` returns them.

        Args:
            z: Standardised parameters of shape `(batch_dim, num_parameters)`.
        """
        features = self.features(z)
        hidden = self.hidden(features)
        y = z.new_zeros(len(z), 0)
        if self.coordinates is not None:
            u = self._sample(features, hidden)
            coordinates = self.coordinates
            standardized = u @ coordinates.cholesky.T + coordinates.bias
            y = standardized * coordinates.scale + coordinates.mean
        categories = torch.zeros(len(z), 0, dtype=torch.long, device=z.device)
        if hasattr(self, "logits"):
            categories = self._categorical(features, hidden).sample()
        return y, categories

    def _sample(self, features: Tensor, hidden: Tensor) -> Tensor:
        return self._student(features, hidden).sample()

    def _of_scores(self, features: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
        coordinates = cast(ResidualCoordinates, self.coordinates)
        # Whitening is linear: of the scores it is done once, not for every parameter.
        y = coordinates.standardize(y) - coordinates.bias
        u = y @ coordinates.whitening.T
        if self.training and coordinates.holds_out:
            # To the residuals of a regression without the simulation itself.
            leverage = coordinates.leverage(features)
            residual = y - features @ coordinates.weight.T
            u = u + (residual * leverage / (1 - leverage)) @ coordinates.whitening.T
        return self._log_density(features, hidden, u)

    def _log_density(self, features: Tensor, hidden: Tensor, u: Tensor) -> Tensor:
        return self._student(features, hidden).log_prob(u).sum(-1)

    def _student(self, features: Tensor, hidden: Tensor) -> StudentT:
        coordinates = cast(ResidualCoordinates, self.coordinates)
        location, log_scale = self.location_and_scale(hidden).chunk(2, -1)
        regression = coordinates.whitening @ coordinates.weight
        location = location + features @ regression.T
        log_scale = MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)
        degrees_of_freedom = 2.0 + F.softplus(self.tails)
        return StudentT(
            degrees_of_freedom, location, log_scale.exp(), validate_args=False
        )

    def _of_categories(
        self, features: Tensor, hidden: Tensor, categories: Tensor
    ) -> Tensor:
        categorical = self._categorical(features, hidden)
        log_prob = categorical.log_prob(categories.clamp_min(0))
        return log_prob.where(categories >= 0, 0.0).sum(-1)

    def _categorical(self, features: Tensor, hidden: Tensor) -> Categorical:
        impossible = cast(Tensor, self.impossible)
        logits = self.logits(hidden) + self.logistic(features)
        logits = logits.unflatten(-1, impossible.shape)
        logits = logits.masked_fill(impossible, -torch.inf)
        return Categorical(logits=logits, validate_args=False)


class CorrelatedLikelihood(IndependentLikelihood):
    r"""Outputs each of which depends on those before it, as the parameters say.

    .. math:: u_i \sim t_{\nu_i}\big(\mu_i + \textstyle\sum_{j < i} B_{ij}(z)
        (u_j - \mu_j), \; \sigma_i(z)\big), \qquad \mu = W A \varphi(z) + \mu(z)

    A Gaussian of any covariance is of this kind, with the inverse of its Cholesky
    factor in $\sigma$ and $B$: unlike a fixed whitening, they turn with the parameters.

    Args:
        features: Features of the parameters.
        coordinates: Ridge regression of the scores, of two or more.
        logistic: Logistic regressions of the discrete outputs.
        outputs: What gave the scores, with the values of discrete outputs.
        dropout: Dropout probability.
    """

    pairs: Tensor

    def __init__(
        self,
        features: Features,
        coordinates: ResidualCoordinates,
        logistic: LogisticRegressions,
        outputs: Outputs,
        dropout: float,
    ) -> None:
        super().__init__(features, coordinates, logistic, outputs, dropout)
        pairs = torch.tril_indices(coordinates.numel, coordinates.numel, -1)
        self.register_buffer("pairs", pairs)
        self.coefficients = _zero_layer(HIDDEN_FEATURES, pairs.shape[1])

    def _log_density(self, features: Tensor, hidden: Tensor, u: Tensor) -> Tensor:
        student = self._student(features, hidden)
        later, earlier = self.pairs
        products = self.coefficients(hidden) * (u - student.loc)[..., earlier]
        shift = torch.zeros_like(student.loc).index_add(-1, later, products)
        return student.log_prob(u - shift).sum(-1)

    def _sample(self, features: Tensor, hidden: Tensor) -> Tensor:
        student = self._student(features, hidden)
        noise = student.sample() - student.loc
        coefficients = noise.new_zeros(*noise.shape, noise.shape[-1])
        later, earlier = self.pairs
        coefficients[:, later, earlier] = self.coefficients(hidden)
        # Of the deviations: u = B u + noise, with a strictly lower triangular B.
        identity = torch.eye(noise.shape[-1]).to(noise)
        deviations = torch.linalg.solve_triangular(
            identity - coefficients, noise.unsqueeze(-1), upper=False
        )
        return student.loc + deviations.squeeze(-1)


class FlowLikelihood(nn.Module):
    """sbi's masked autoregressive flow of the scores of continuous outputs.

    Args:
        z: Standardised parameters of shape `(num_simulations, num_parameters)`.
        y: Scores of shape `(num_simulations, num_scores)`, two or more.
    """

    def __init__(self, z: Tensor, y: Tensor) -> None:
        super().__init__()
        build = likelihood_nn("maf", z_score_theta="none", z_score_x="none")
        self.flow: ConditionalDensityEstimator = build(z, y)

    def forward(self, z: Tensor, y: Tensor, categories: Tensor) -> Tensor:
        r"""Return $\log \ell$ of shape `(sample_dim, batch_dim)`.

        Args:
            z: Standardised parameters, `(sample_dim, batch_dim, num_parameters)`.
            y: Scores of shape `(batch_dim, num_scores)`.
            categories: Unused.
        """
        shape = z.shape[:2]
        y = y.expand(*shape, -1).reshape(1, shape.numel(), -1)
        return self.flow.log_prob(y, z.flatten(0, 1)).reshape(shape)

    def sample(self, z: Tensor) -> Tuple[Tensor, Tensor]:
        """Draw scores, and no categories.

        Args:
            z: Standardised parameters of shape `(batch_dim, num_parameters)`.
        """
        none = torch.zeros(len(z), 0, dtype=torch.long, device=z.device)
        return self.flow.sample((1,), z)[0], none  # type: ignore[arg-type]


def has_likelihood(x: Tensor) -> bool:
    """Return whether outputs can have surrogates of their likelihood.

    They are few enough, and vary.

    Args:
        x: Simulation outputs of shape `(num_simulations, *condition_shape)`.
    """
    return x.ndim == 2 and x.shape[1] <= MAX_OUTPUTS and bool((num_values(x) > 1).any())


def bounded(log_likelihood: Tensor) -> Tensor:
    """Return log likelihoods with a bound; what is not a number is unlikely."""
    return torch.nan_to_num(log_likelihood, nan=-MAX_LOG_LIKELIHOOD).clamp(
        -MAX_LOG_LIKELIHOOD, MAX_LOG_LIKELIHOOD
    )


def _saturate(z: Tensor) -> Tensor:
    """Return scores bounded at ten standard deviations, as those of the energy."""
    return MAX_SCORE * torch.tanh(z / MAX_SCORE)


def _zero_layer(num_inputs: int, num_outputs: int) -> nn.Linear:
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]


def _lattice_spacing(values: Tensor) -> Tensor:
    """Return the smallest distance of values that recur, zero if most do not."""
    values = _finite(values)
    distinct = values.unique()
    if len(distinct) > len(values) / 2:
        return values.new_zeros(())
    return distinct.diff().min()
