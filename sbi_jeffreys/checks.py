"""Checks of simulations: of each part at the border, of all when training begins."""

import warnings
from typing import Any, List, Optional, Union

import torch
from sbi.utils.sbiutils import ImproperEmpirical
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys.base_measure import event_shape, is_inside
from sbi_jeffreys.persistence import keeping_random_state, log_prior

# How much less probable than all samples of the prior parameters must be to be warned
# of, in nats.
NATS_OF_DOUBT = 50


def check_simulations(theta: Any, x: Any) -> None:
    """Raise where sbi would not, or not in words of the user's.

    They may be a part of the simulations: columns are left to `check_columns`.

    Args:
        theta: Parameters that the user gives, of shape `(num_simulations, dim_theta)`.
        x: Simulation outputs, of shape `(num_simulations, *features)`.

    Raises:
        ValueError: If shapes are not as said, or if parameters are not finite or not
            as many as simulations.
    """
    if not (isinstance(theta, Tensor) and isinstance(x, Tensor)):
        return  # sbi says it well
    if theta.ndim != 2:
        raise ValueError(
            "theta must have shape (num_simulations, num_parameters), got "
            f"{tuple(theta.shape)}. For a single parameter use theta.reshape(-1, 1)."
        )
    if x.ndim < 2:
        raise ValueError(
            f"x must have shape (num_simulations, *features), got {tuple(x.shape)}. "
            "For a single feature use x.reshape(-1, 1)."
        )
    if len(theta) == 0:
        raise ValueError("theta and x hold no simulations.")
    if len(theta) != len(x):
        raise ValueError(
            "theta and x must hold as many parameters as simulations, got "
            f"{len(theta)} and {len(x)}."
        )
    if not torch.isfinite(theta).all():
        bad = (~torch.isfinite(theta)).any(-1).sum().item()
        raise ValueError(
            f"{bad} of {len(theta)} parameter sets in theta are NaN or infinite. "
            "Simulations may fail, parameters may not: check how they were drawn."
        )


def check_same_shape(x: Tensor, x_before: Tensor) -> None:
    """Raise if outputs are not such as those that were appended before.

    Args:
        x: Simulation outputs of shape `(num_simulations, *features)`.
        x_before: Some of those before.

    Raises:
        ValueError: If their features differ in shape.
    """
    if x.shape[1:] != x_before.shape[1:]:
        raise ValueError(
            f"x has features of shape {tuple(x.shape[1:])}, but the simulations that "
            f"were appended before have {tuple(x_before.shape[1:])}. Together they "
            "cannot be trained on: give all simulations the same outputs."
        )


def check_columns(theta: Tensor) -> None:
    """Raise or warn where parameters have no density, or none in single precision.

    Args:
        theta: The parameters of all simulations that a training uses. Of a part, such
            as replicates of one parameter set, columns say nothing.

    Raises:
        ValueError: If a column is constant, discrete or too coarse for single
            precision.
    """
    theta = theta.cpu()  # not every device has double precision
    constant = (theta == theta[:1]).all(0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"Column(s) {constant} of theta are constant. A parameter that never "
            "varies has no posterior: leave it out of theta and of the prior."
        )
    resolution = torch.finfo(torch.float32).eps * theta.abs().median(0).values
    spread = theta.double().std(0)
    coarse = (resolution > 0.02 * spread).nonzero().flatten().tolist()
    if coarse:
        raise ValueError(
            f"Column(s) {coarse} of theta vary by {spread[coarse[0]]:.3g} around "
            f"{theta[:, coarse[0]].mean():.6g}, of which single precision leaves only "
            "few distinct values. Take an offset off theta and the prior."
        )
    discrete = _discrete_columns(theta)
    if discrete:
        raise ValueError(
            f"Column(s) {discrete} of theta are discrete: they hold few values, again "
            "and again. A flow and its proxy are densities of continuous parameters. "
            "For continuous and discrete parameters together use sbi.inference.MNPE, "
            "with the discrete columns last; its counterpart for discrete columns of x "
            "is sbi.inference.MNLE."
        )
    copies = [
        (first, second)
        for second in range(theta.shape[1])
        for first in range(second)
        if torch.equal(theta[:, first], theta[:, second])
    ]
    if copies:
        warnings.warn(
            f"Columns {copies} of theta are the same. No density exists on a line: the "
            "losses will fall without end. Leave out the copies.",
            stacklevel=6,  # the user's call of train
        )


def _discrete_columns(theta: Tensor) -> List[int]:
    """Return the columns whose values repeat as those of a continuous one do not."""
    columns = []
    for column, values in enumerate(theta.T):
        num_distinct = len(values.unique())
        few = num_distinct <= 20 and len(values) > 5 * num_distinct
        # Floats from 2**24 on are all integers.
        integers = bool(((values == values.round()) & (values.abs() < 2**20)).all())
        if few or (integers and len(values) >= 2 * num_distinct):
            columns.append(column)
    return columns


def check_prior(
    prior: Optional[Distribution], theta: Any, device: Union[str, torch.device]
) -> None:
    """Raise or warn if the parameters are not such as the prior gives.

    Args:
        prior: The prior, if there is one.
        theta: Parameters that were drawn from it, as the user says.
        device: Device of the prior.

    Raises:
        ValueError: If prior and parameters have different dimensions.
    """
    if prior is None or not isinstance(theta, Tensor):
        return
    if isinstance(prior, ImproperEmpirical):
        return  # sbi's stand-in where no prior was given, made of the parameters
    shape = event_shape(prior)
    if shape != theta.shape[1:]:
        raise ValueError(
            f"theta has {theta.shape[1]} parameters, but the prior is over "
            f"{shape.numel()}."
        )
    # Simulations may be kept on another device than the prior, that of the training.
    theta = theta.to(device, torch.float32)
    num_outside = int((~is_inside(prior, theta)).sum())
    if num_outside:
        warnings.warn(
            f"{num_outside} of {len(theta)} parameter sets lie outside the prior's "
            "support, where the proxy has no density. Were they drawn from this prior, "
            "in its units?",
            stacklevel=3,
        )
    with keeping_random_state(device):
        typical = log_prior(prior, prior.sample(torch.Size((1000,))))
    lowest = typical[typical.isfinite()].min() if typical.isfinite().any() else 0.0
    density = log_prior(prior, theta)
    num_far = int((density.isfinite() & (density < lowest - NATS_OF_DOUBT)).sum())
    if num_far:
        warnings.warn(
            f"{num_far} of {len(theta)} parameter sets are far in the tails of the "
            f"prior, more than {NATS_OF_DOUBT} nats below any of 1,000 of its samples. "
            "Were they drawn from this prior, in its units?",
            stacklevel=3,
        )
