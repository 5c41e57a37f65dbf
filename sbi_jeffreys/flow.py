"""Reparametrised samples of a conditional normalizing flow, with their densities."""

from typing import Tuple

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.neural_nets.estimators.mixture_density_estimator import (
    MixtureDensityEstimator,
)
from sbi.neural_nets.estimators.nflows_flow import NFlowsFlow
from torch import Tensor


def rsample_and_log_prob(
    flow: ConditionalDensityEstimator, num_samples: int, x: Tensor
) -> Tuple[Tensor, Tensor]:
    r"""Return samples $\theta = T_\phi(z; x)$ and $\log p_\phi(\theta \mid x)$.

    Both carry gradients to the parameters $\phi$ of the flow. The density comes from
    the inversion that made the samples, at no further pass through the flow.

    `NFlowsFlow.sample_and_log_prob` of sbi 0.27 reads nflows' (batch, sample) order
    as (sample, batch), so that with several conditions its densities do not belong to
    its samples. Flows of nflows are therefore asked directly.

    Args:
        flow: Conditional flow.
        num_samples: Number of samples for every condition.
        x: Conditions of shape `(batch_dim, *condition_shape)`.

    Returns:
        Samples of shape `(num_samples, batch_dim, *input_shape)` and their log
        densities of shape `(num_samples, batch_dim)`.
    """
    if isinstance(flow, NFlowsFlow):
        theta, log_prob = flow.net.sample_and_log_prob(num_samples, context=x)
        return theta.transpose(0, 1), log_prob.transpose(0, 1)
    return flow.sample_and_log_prob(torch.Size((num_samples,)), x)


def sample_and_log_prob(
    flow: ConditionalDensityEstimator, sample_shape: torch.Size, x: Tensor
) -> Tuple[Tensor, Tensor]:
    r"""Return what `rsample_and_log_prob` does, with samples of any shape.

    Args:
        flow: Conditional flow.
        sample_shape: Shape of the samples.
        x: Conditions of shape `(batch_dim, *condition_shape)`.

    Returns:
        Samples of shape `(*sample_shape, batch_dim, *input_shape)` and their log
        densities of shape `(*sample_shape, batch_dim)`.
    """
    shape = torch.Size(sample_shape)
    theta, log_prob = rsample_and_log_prob(flow, shape.numel(), x)
    return (
        theta.reshape(*shape, *theta.shape[1:]),
        log_prob.reshape(*shape, log_prob.shape[1]),
    )


def score(flow: ConditionalDensityEstimator, theta: Tensor, x: Tensor) -> Tensor:
    r"""Return the score $\nabla_\theta \log p_\phi(\theta \mid x)$.

    Args:
        flow: Conditional flow.
        theta: Parameters of shape `(sample_dim, batch_dim, *input_shape)`.
        x: Conditions of shape `(batch_dim, *condition_shape)`.

    Returns:
        The score, of the shape of `theta`, without gradients to the flow.
    """
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        # Parameters that are asked for no gradient cost no step backwards.
        log_prob = flow.log_prob(theta, x)
        (gradient,) = torch.autograd.grad(log_prob.sum(), theta)
    return gradient


def check_has_rsample(flow: ConditionalDensityEstimator, x: Tensor) -> None:
    """Raise unless the flow gives samples with gradients and their own densities.

    Args:
        flow: Conditional density estimator, as built.
        x: A few conditions of shape `(batch_dim, *condition_shape)`.

    Raises:
        TypeError: If `flow` is no conditional density estimator.
        ValueError: If its samples carry no gradient, or if the densities it returns
            with its samples are not those of its `log_prob`.
    """
    if not isinstance(flow, ConditionalDensityEstimator):
        raise TypeError(
            "The builder given as `density_estimator` must return a "
            f"`ConditionalDensityEstimator`, got {type(flow).__name__}."
        )
    mend = (
        "The reverse KL divergence of JeffreysNPE needs samples with gradients. Use a "
        "normalizing flow: 'maf', 'nsf', 'maf_rqs' or one of posterior_nn's "
        "'zuko_...' flows, or train this estimator with sbi.inference.NPE."
    )
    if isinstance(flow, MixtureDensityEstimator):
        # Its samples carry gradients, but none to the weights of the components.
        raise ValueError(f"Samples of a mixture are not differentiable. {mend}")
    with torch.enable_grad():
        try:
            theta, log_prob = rsample_and_log_prob(flow, 2, x)
        except NotImplementedError as err:
            raise ValueError(
                f"{type(flow).__name__} cannot draw samples with densities: {err}. "
                + mend
            ) from err
    if not theta.requires_grad:
        raise ValueError(f"Samples of {type(flow).__name__} carry no gradient. {mend}")
    with torch.no_grad():
        difference = (flow.log_prob(theta, x) - log_prob).abs().median().item()
    # Bisection and splines invert to about 1e-5 per dimension; mixed-up conditions
    # are off by tenths.
    if not difference < 0.05:
        raise ValueError(
            f"{type(flow).__name__}.sample_and_log_prob returns densities that differ "
            f"from its log_prob by {difference:.2g} (median). {mend} If it is one of "
            "these, look for extreme values in theta and x, and let it z-score both."
        )
