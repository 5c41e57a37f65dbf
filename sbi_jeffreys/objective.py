r"""The Jeffreys objective: three divergences and their Lagrangian.

With the flow $p_\phi(\theta \mid x)$, the proxy $q_\psi(\theta \mid x)$ and the
simulations $\pi(\theta, x)$,

.. math::
    D_1 &= \mathbb{E}_\pi[-\log p_\phi(\theta \mid x)]
        & \text{forward KL of the flow, up to the entropy of } \pi \\
    D_2 &= \mathbb{E}_x \mathbb{E}_{p_\phi}[\log p_\phi - \log q_\psi]
        & \text{reverse KL of the flow to the proxy} \\
    D_3 &= \mathbb{E}_\pi[-\log q_\psi(\theta \mid x)]
        & \text{forward KL of the proxy, up to the same entropy}

after O. Ben-Dov and L. F. O. Chamon, "Adaptive Symmetrization of the KL Divergence"
(arXiv:2511.11159). The training minimises

.. math:: \lambda_1 D_1 + \lambda_2 D_2 + \lambda_3 D_3

over both models, with the weights of `sbi_jeffreys.weights`. Of $D_2$ the flow lowers
the symmetric form, $\mathrm{KL}(p \Vert q) + \mathrm{KL}(q \Vert p)$, or the second
term alone, see `sbi_jeffreys.stages`.
"""

from dataclasses import dataclass, replace
from typing import Dict, Iterable, Optional, Tuple, TypeVar

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor

from sbi_jeffreys.candidates import log_prob_of_simulations
from sbi_jeffreys.energy import ConditionalEnergy
from sbi_jeffreys.flow import rsample_and_log_prob, score
from sbi_jeffreys.moves import metropolis_moves
from sbi_jeffreys.partition import LogPartition, from_log_weights, log_mixture


@dataclass
class Proposals:
    r"""Samples at every condition, with all that the proxy needs to know of them.

    They stay exact proposals of the partition function when the flow has moved on:
    their weights hold the density that they were drawn with. One set of samples
    therefore serves several epochs. The reverse divergence that the proxy lowers is
    then that of the flow as it was when they were drawn.

    Attributes:
        theta: $K$ samples of the flow, then $M$ of the reference, of shape
            `(K + M, batch_dim, *input_shape)`.
        log_weights: $\log b(\theta) - \log m(\theta \mid x)$, `(K + M, batch_dim)`.
        log_ratio: $\log p(\theta \mid x) - \log b(\theta)$ of the flow's samples, with
            $b$ extended beyond the support, `(K, batch_dim)`.
    """

    theta: Tensor
    log_weights: Tensor
    log_ratio: Tensor

    def at(self, index: Tensor) -> "Proposals":
        """Return the proposals at the conditions `index`."""
        return Proposals(
            self.theta[:, index], self.log_weights[:, index], self.log_ratio[:, index]
        )

    def subset(self, num_flow_samples: int, num_reference_samples: int) -> "Proposals":
        """Return a random subset, whose mixture must be that of the whole.

        Args:
            num_flow_samples: Number of the flow's samples.
            num_reference_samples: Number of the reference's samples. Their ratio is
                that of all samples, or the weights would be those of another mixture.
        """
        num_flow = len(self.log_ratio)
        of_flow = torch.randperm(num_flow)[:num_flow_samples]
        num_reference = len(self.theta) - num_flow
        of_reference = torch.randperm(num_reference)[:num_reference_samples]
        index = torch.cat((of_flow, num_flow + of_reference)).to(self.theta.device)
        return Proposals(
            self.theta[index],
            self.log_weights[index],
            self.log_ratio[index[: len(of_flow)]],
        )


@dataclass
class ProxySamples:
    r"""Samples of the proxy at every condition, from which the flow learns.

    Attributes:
        theta: Samples of shape `(num_samples, batch_dim, *input_shape)`.
        log_prob: $\log q(\theta \mid x)$, of shape `(num_samples, batch_dim)`.
        log_partition: $\log Z(x)$, of shape `(batch_dim,)`.
        effective_sample_size: Of the weights they were drawn by, `(batch_dim,)`.
    """

    theta: Tensor
    log_prob: Tensor
    log_partition: Tensor
    effective_sample_size: Tensor

    def at(self, index: Tensor) -> "ProxySamples":
        """Return the samples at the conditions `index`."""
        return ProxySamples(
            self.theta[:, index],
            self.log_prob[:, index],
            self.log_partition[index],
            self.effective_sample_size[index],
        )

    def subset(self, num_samples: int) -> "ProxySamples":
        """Return a random subset of the samples."""
        index = torch.randperm(len(self.theta))[:num_samples].to(self.theta.device)
        return replace(self, theta=self.theta[index], log_prob=self.log_prob[index])


Samples = TypeVar("Samples", Proposals, ProxySamples)


def concatenate(parts: Iterable[Samples], num_conditions: int) -> Samples:
    """Return the samples at several batches of conditions as one.

    Each is put in its place as it comes: all parts and the whole at once would take
    twice the memory.

    Args:
        parts: The samples at some of the conditions each, at least one part.
        num_conditions: Number of conditions of all parts.
    """
    whole: Dict[str, Tensor] = {}
    start = 0
    for part in parts:
        for name, values in vars(part).items():
            axis = min(1, values.ndim - 1)  # that of the conditions
            if start == 0:
                shape = list(values.shape)
                shape[axis] = num_conditions
                whole[name] = values.new_empty(shape)
            place = whole[name].narrow(axis, start, values.shape[axis])
            place.copy_(values)
        start += part.theta.shape[1]
    return type(part)(**whole)


@dataclass
class Divergences:
    r"""The three divergences at every simulation of a batch, `None` where unused.

    Attributes:
        forward_kl: $-\log p(\theta \mid x)$, of shape `(batch_dim,)`, with gradients
            to the flow.
        reverse_kl: $\mathrm{KL}(p \Vert q)$ at every $x$, with gradients to the proxy;
            those to the flow are `JeffreysObjective.reverse_kl_of_flow`.
        proxy_forward_kl: $-\log q(\theta \mid x)$ with gradients to the proxy.
        log_partition: $\log Z(x)$ with its effective sample size.
        likelihood_loss: $-\sum_k \log \ell_k(x \mid \theta)$ of the surrogates of the
            likelihood, with gradients to them.
    """

    forward_kl: Optional[Tensor] = None
    reverse_kl: Optional[Tensor] = None
    proxy_forward_kl: Optional[Tensor] = None
    log_partition: Optional[LogPartition] = None
    likelihood_loss: Optional[Tensor] = None

    @property
    def losses(self) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """The three divergences in the order of their weights."""
        return self.forward_kl, self.reverse_kl, self.proxy_forward_kl


class JeffreysObjective:
    r"""Monte Carlo estimates of the three divergences.

    For every simulation $(\theta, x)$, $K$ samples of the flow serve both the reverse
    divergence of the proxy and, with $M$ samples of the base measure's reference (the
    prior), the partition function.

    Args:
        num_flow_samples: $K$, at least 1.
        num_reference_samples: $M$, at least 1.
        num_reverse_samples: Number of fresh samples of the flow for its own gradient
            of the reverse divergence, at least 1.

    Raises:
        ValueError: If a number of samples is below 1.
    """

    def __init__(
        self,
        num_flow_samples: int = 16,
        num_reference_samples: int = 16,
        num_reverse_samples: int = 1,
    ) -> None:
        for name, value in (
            ("num_flow_samples", num_flow_samples),
            ("num_reference_samples", num_reference_samples),
            ("num_reverse_samples", num_reverse_samples),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.num_flow_samples = num_flow_samples
        self.num_reference_samples = num_reference_samples
        self.num_reverse_samples = num_reverse_samples

    @torch.no_grad()
    def propose(
        self,
        flow: ConditionalDensityEstimator,
        proxy: ConditionalEnergy,
        x: Tensor,
        multiple: int = 1,
    ) -> Proposals:
        """Draw samples of the flow and of the reference at every condition.

        Args:
            flow: The flow $p$.
            proxy: The proxy $q$, whose base measure has the reference.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
            multiple: How many times as many samples to draw as a step takes.

        Returns:
            The samples with their densities.
        """
        K = multiple * self.num_flow_samples
        M = multiple * self.num_reference_samples
        theta_flow, log_flow = _finite(*rsample_and_log_prob(flow, K, x))
        theta_reference = proxy.base.sample(M, len(x))
        theta = torch.cat((theta_flow, theta_reference))
        log_flow = torch.cat((log_flow, flow.log_prob(theta_reference, x)))
        log_m = log_mixture(log_flow, proxy.base.reference_log_prob(theta), K, M)
        return Proposals(
            theta,
            proxy.base.log_prob(theta) - log_m,
            log_flow[:K] - proxy.base.extended_log_prob(theta_flow),
        )

    def proxy_divergences(
        self, proxy: ConditionalEnergy, theta: Tensor, x: Tensor, proposals: Proposals
    ) -> Tuple[Tensor, Tensor, LogPartition]:
        r"""Estimate the two divergences that the proxy lowers, and $\log Z(x)$.

        .. math::
            D_2 &= \tfrac1K \textstyle\sum_{\theta_k \in s}
                [\log p(\theta_k \mid x) - \log b(\theta_k) - f(\theta_k, x) +
                \log \hat Z(x)] - a \log a \\
            D_3 &= -\log b(\theta) - f(\theta, x) + \log \hat Z(x)

        $D_2 = a \, \mathrm{KL}(p_s \Vert q)$ is that of the flow within the support $s$
        of the base measure, where the share $a$ of its samples lies: its posterior is
        cut off there. On an energy beyond, which $Z$ does not count, it must not
        depend, or it had no lower bound.

        Args:
            proxy: The proxy $q$.
            theta: Parameters of shape `(batch_dim, *input_shape)`.
            x: Simulation outputs of shape `(batch_dim, *condition_shape)`.
            proposals: What `propose` drew at these conditions.

        Returns:
            $D_2$ and $D_3$ of shape `(batch_dim,)`, and the partition function.
        """
        # One pass of the proxy over the simulations and all samples.
        f = proxy(torch.cat((theta.unsqueeze(0), proposals.theta)), x)
        log_partition = self._log_partition(f[1:] + proposals.log_weights)
        log_z = log_partition.value
        num_flow = len(proposals.log_ratio)
        log_ratio = proposals.log_ratio - f[1 : 1 + num_flow] + log_z
        inside = ~torch.isneginf(proposals.log_weights[:num_flow])
        return (
            _divergence_inside(log_ratio, inside),
            log_z - proxy.base.extended_log_prob(theta) - f[0],
            log_partition,
        )

    def _log_partition(self, log_weights: Tensor) -> LogPartition:
        return from_log_weights(log_weights)

    @torch.no_grad()
    def sample_proxy(
        self,
        proxy: ConditionalEnergy,
        x: Tensor,
        proposals: Proposals,
        num_samples: int,
        num_moves: int = 0,
    ) -> ProxySamples:
        r"""Draw samples of the proxy: resampled by their weights, then moved.

        Where the weights are uneven, resampling repeats samples; a few Metropolis
        moves with the proxy as their stationary distribution spread them.

        Args:
            proxy: The proxy $q$.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
            proposals: What `propose` drew at these conditions.
            num_samples: Number of samples at every condition.
            num_moves: Number of moves of each.

        Returns:
            The samples, without moves some of them the same.
        """
        log_weights = proxy(proposals.theta, x) + proposals.log_weights
        log_partition = self._log_partition(log_weights)
        weights = torch.softmax(log_weights, 0).nan_to_num(nan=0.0)
        # Where no weight is a number, any sample is as good.
        weights = torch.where(weights.sum(0) > 0, weights, 1.0)
        index = torch.multinomial(weights.T, num_samples, replacement=True).T
        condition = torch.arange(len(x), device=index.device)
        theta = proposals.theta[index, condition]
        if num_moves > 0:
            theta = metropolis_moves(
                lambda points: proxy.log_unnormalized(points, x),
                theta,
                num_moves,
                pool=proposals.theta[: len(proposals.log_ratio)],
            )
        log_z = log_partition.debiased
        return ProxySamples(
            theta,
            proxy.log_unnormalized(theta, x) - log_z,
            log_z,
            log_partition.effective_sample_size,
        )

    def forward_kl_to_proxy(
        self, flow: ConditionalDensityEstimator, x: Tensor, samples: ProxySamples
    ) -> Tensor:
        r"""Estimate $\mathrm{KL}(q \Vert p)$ with its gradient to the flow.

        .. math:: \tfrac1S \textstyle\sum_s [\log q(\theta_s \mid x) -
            \log p(\theta_s \mid x)], \qquad \theta_s \sim q

        With $\mathrm{KL}(p \Vert q)$ it is the Jeffreys divergence of the two models.
        Where the flow has no mass the reverse divergence is blind; this one is not.

        Args:
            flow: The flow $p$.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
            samples: Samples of the proxy at these conditions.

        Returns:
            Of shape `(batch_dim,)`.
        """
        return (samples.log_prob - flow.log_prob(samples.theta, x)).mean(0)

    def forward_kls_of_flow(
        self,
        flow: ConditionalDensityEstimator,
        theta: Tensor,
        x: Tensor,
        samples: ProxySamples,
    ) -> Tuple[Tensor, Tensor]:
        r"""Return $D_1$, and what `forward_kl_to_proxy` does, of one pass of the flow.

        Two passes over few points take nearly twice as long as one over all of them.

        Args:
            flow: The flow $p$.
            theta: Parameters of shape `(batch_dim, *input_shape)`.
            x: Simulation outputs of shape `(batch_dim, *condition_shape)`.
            samples: Samples of the proxy at these conditions.

        Returns:
            $-\log p(\theta \mid x)$ and $\mathrm{KL}(q \Vert p)$, `(batch_dim,)`.
        """
        points = torch.cat((theta.unsqueeze(0), samples.theta))
        log_p = log_prob_of_simulations(flow, points, x)
        return -log_p[0], (samples.log_prob - log_p[1:]).mean(0)

    @torch.no_grad()
    def reverse_kl(
        self,
        flow: ConditionalDensityEstimator,
        proxy: ConditionalEnergy,
        x: Tensor,
        log_partition: Tensor,
        num_samples: int,
    ) -> Tensor:
        r"""Estimate $D_2$, as `proxy_divergences`, from fresh samples of the flow.

        Args:
            flow: The flow $p$.
            proxy: The proxy $q$.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
            log_partition: $\log Z(x)$ of shape `(batch_dim,)`.
            num_samples: Number of samples at every condition.

        Returns:
            Of shape `(batch_dim,)`.
        """
        theta, log_p = _finite(*rsample_and_log_prob(flow, num_samples, x))
        log_b = proxy.base.log_prob(theta)
        log_q = log_b + proxy(theta, x) - log_partition
        return _divergence_inside(log_p - log_q, ~torch.isneginf(log_b))

    def reverse_kl_of_flow(
        self,
        flow: ConditionalDensityEstimator,
        proxy: ConditionalEnergy,
        x: Tensor,
        log_partition: Tensor,
    ) -> Tensor:
        r"""Estimate $\mathrm{KL}(p \Vert q)$ with its gradient to the flow.

        The gradient is the path gradient [1]: that of samples
        $\theta = T_\phi(z; x)$ through $\log p - \log q$,

        .. math:: \mathbb{E}_z \left[ \nabla_\theta (\log p - \log q)^\top
            \frac{\partial T_\phi(z; x)}{\partial \phi} \right]

        without the score term, whose expectation is zero. It vanishes where $p = q$.
        Samples beyond the support are charged by the extended base measure alone, which
        leads them back: of the energy there, nothing is known.

        [1] G. Roeder, Y. Wu, D. Duvenaud, "Sticking the Landing: Simple,
        Lower-Variance Gradient Estimators for Variational Inference", NeurIPS 2017.

        Args:
            flow: The flow $p$.
            proxy: The proxy $q$.
            x: Conditions of shape `(batch_dim, *condition_shape)`.
            log_partition: $\log Z(x)$ of shape `(batch_dim,)`.

        Returns:
            Of shape `(batch_dim,)`.
        """
        theta, log_p = rsample_and_log_prob(flow, self.num_reverse_samples, x)
        points = theta.detach().requires_grad_()
        with torch.enable_grad():
            f = proxy(points, x)
            inside = ~torch.isneginf(proxy.base.log_prob(points.detach()))
            log_q = proxy.base.extended_log_prob(points) + f.where(inside, 0.0)
            (slope_q,) = torch.autograd.grad(log_q.sum(), points)
        path = score(flow, points, x) - slope_q
        value = (log_p - log_q).detach().mean(0) + log_partition.detach()
        # Zero in value: it only carries the gradient through the samples.
        return value + (path * (theta - points.detach())).sum(-1).mean(0)


def _divergence_inside(log_ratio: Tensor, inside: Tensor) -> Tensor:
    """Return the divergence of what lies inside, times the share that does."""
    share = inside.float().mean(0)
    # Not a product: beyond the support a log ratio may be infinite.
    return log_ratio.where(inside, 0.0).mean(0) - torch.xlogy(share, share)


def _finite(theta: Tensor, log_prob: Tensor) -> Tuple[Tensor, Tensor]:
    """Return samples with those that are not finite replaced by one that is.

    At an outlying condition a flow may overflow in a few of its samples, which would
    cost the divergences of the whole batch.
    """
    finite = theta.flatten(2).isfinite().all(-1) & log_prob.isfinite()
    if finite.all():
        return theta, log_prob
    sample = torch.arange(len(theta), device=theta.device).unsqueeze(1)
    index = torch.where(finite, sample, finite.int().argmax(0))
    condition = torch.arange(theta.shape[1], device=theta.device)
    return theta[index, condition], log_prob[index, condition]
