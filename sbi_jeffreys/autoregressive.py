r"""Inversion of masked autoregressive flows in one pass instead of one a dimension.

An affine autoregressive transform is inverted dimension by dimension,

.. math:: \theta_i = (z_i - m_i(\theta_{<i}, x)) / s_i(\theta_{<i}, x),

where a masked network [1] gives $m$ and $s$. nflows runs the whole network once for
every $i$. But its hidden units are sorted: one of degree $k$ sees $\theta_{\le k}$
alone, so that it is known as soon as $\theta_k$ is, and does not change any more.
Computing each unit when its turn comes takes one pass for all dimensions together, and
none of the weights that the masks set to zero.

[1] M. Germain, K. Gregor, I. Murray, H. Larochelle, "MADE: Masked Autoencoder for
Distribution Estimation", ICML 2015.
"""

from typing import List, Optional, Tuple, cast

import torch
from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
from nflows.transforms.made import MADE, MaskedLinear
from torch import Tensor, nn
from torch.nn import functional as F


class OnePassAffineAutoregressiveTransform(MaskedAffineAutoregressiveTransform):
    """nflows' transform, whose inverse takes one pass through its network.

    A condition that many parameters share goes through its layer once. Parameters and
    values are nflows'. It fits networks of feedforward blocks without batch
    normalisation, such as sbi builds; see `invert_in_one_pass`.
    """

    def forward(
        self, inputs: Tensor, context: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        r"""Return $z$ and $\log |\partial z / \partial \theta|$.

        Args:
            inputs: $\theta$ of shape `(batch_dim, num_parameters)`.
            context: Of shape `(batch_dim, num_context_features)`.

        Returns:
            Of shape `(batch_dim, num_parameters)` and `(batch_dim,)`.
        """
        context = _once_if_shared(context)
        return super().forward(inputs, context)  # type: ignore[return-value]

    def inverse(
        self, inputs: Tensor, context: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        r"""Return $\theta$ and $\log |\partial \theta / \partial z|$.

        Args:
            inputs: $z$ of shape `(batch_dim, num_parameters)`.
            context: Of shape `(batch_dim, num_context_features)`.

        Returns:
            Of shape `(batch_dim, num_parameters)` and `(batch_dim,)`.
        """
        made = self.autoregressive_net
        if any(block.dropout.p > 0 and block.dropout.training for block in made.blocks):
            # Every pass of nflows' drops other units.
            return super().inverse(inputs, context)  # type: ignore[return-value]
        layers = [made.initial_layer] + [block.linear for block in made.blocks]
        weights, biases, orders, ends = _sorted_by_degree(layers, self.features)
        final_weight = made.final_layer.weight[:, orders[-1]]
        final_bias = made.final_layer.bias.unsqueeze(1)
        of_context = None
        context = _once_if_shared(context)
        if context is not None:
            of_context = made.activation(made.context_layer(context)).T[orders[0]]
        # Units in rows: those of a degree are then in one piece of memory.
        z = inputs.T
        theta = z[:0]
        hidden = [z.new_empty(0, z.shape[1]) for _ in layers]
        log_scales = []
        for i in range(self.features):
            below = theta
            for k in range(len(layers)):
                units = slice(ends[k][i], ends[k][i + 1])
                new = torch.addmm(
                    biases[k][units], weights[k][units, : len(below)], below
                )
                if k == 0 and of_context is not None:
                    new = new + of_context[units]
                below = torch.cat((hidden[k], made.activation(new)))
                hidden[k] = below
            rows = slice(2 * i, 2 * i + 2)
            raw_scale, shift = torch.addmm(
                final_bias[rows], final_weight[rows, : len(below)], below
            )
            scale = F.softplus(raw_scale) + self._epsilon
            theta = torch.cat((theta, ((z[i] - shift) / scale).unsqueeze(0)))
            log_scales.append(torch.log(scale))
        return theta.T, -torch.stack(log_scales).sum(0)


def _once_if_shared(context: Optional[Tensor]) -> Optional[Tensor]:
    """Return one row of a context expanded from one, as of a posterior.

    The network adds what its layer makes of it to every row of parameters.
    """
    if context is not None and len(context) > 1 and context.stride(0) == 0:
        return context[:1]
    return context


def _sorted_by_degree(
    layers: List[MaskedLinear], num_parameters: int
) -> Tuple[List[Tensor], List[Tensor], List[Tensor], List[List[int]]]:
    """Return the layers with their units, and the inputs of these, in order of degree.

    Args:
        layers: All but the last.
        num_parameters: Number of dimensions.

    Returns:
        Weights, biases with an axis for samples, orders of the units, and for each
        layer the number of its units of a degree below 0, 1, 2, ...
    """
    weights, biases, orders, ends = [], [], [], []
    order = torch.arange(num_parameters, device=layers[0].weight.device)
    for layer in layers:
        degrees = cast(Tensor, layer.degrees)
        before, order = order, torch.argsort(degrees, stable=True)
        weights.append(layer.weight[order][:, before])
        biases.append(layer.bias[order].unsqueeze(1))
        orders.append(order)
        counts = torch.bincount(degrees, minlength=num_parameters + 1)
        ends.append([0] + counts.cumsum(0).tolist())
    return weights, biases, orders, ends


def invert_in_one_pass(flow: nn.Module) -> None:
    """Let all masked affine autoregressive transforms of a flow invert in one pass.

    Transforms that this does not fit are left as they are.

    Args:
        flow: Any module, changed in place. Parameters and their names stay.
    """
    for module in flow.modules():
        if type(module) is not MaskedAffineAutoregressiveTransform:
            continue
        made = module.autoregressive_net
        # A subclass of MADE may compute anything.
        if type(made) is not MADE or made.use_residual_blocks:
            continue
        if all(block.batch_norm is None for block in made.blocks):
            module.__class__ = OnePassAffineAutoregressiveTransform
