r"""Logistic regressions of discrete outputs on the parameters.

.. math:: P(c = k \mid \theta) \propto \exp (A_k \varphi(\theta) + a_k), \qquad
    \min_{A, a} \; \sum_j -\log P(c_j \mid \theta_j) + \tfrac12 \lVert A \rVert^2

What the ridge regression is to continuous outputs: it is known without a network, which
learns what the regression leaves. The penalty is a standard normal prior of the
coefficients, of features with a standard deviation of one.
"""

import math

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from sbi_jeffreys.features import Features

# Simulations that are enough for the coefficients.
MAX_SIMULATIONS = 5_000
MAX_ITERATIONS = 1_000


class LogisticRegressions(nn.Module):
    """Logits of the values of every discrete output.

    Args:
        features: Features of the parameters.
        z: Standardised parameters of shape `(num_simulations, num_parameters)`.
        categories: Categories of shape `(num_simulations, num_discrete)`, -1 where an
            output is missing.
        num_categories: Number of categories of the output that has most.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, features: Features, z: Tensor, categories: Tensor, num_categories: int
    ) -> None:
        super().__init__()
        z, categories = z[:MAX_SIMULATIONS], categories[:MAX_SIMULATIONS]
        inputs = features(z)
        num_outputs = categories.shape[1]
        weight = inputs.new_zeros(num_outputs, num_categories, inputs.shape[1])
        # A value that is not among them has half a simulation.
        rare = math.log(0.5 / max(1, len(z)))
        bias = inputs.new_full((num_outputs, num_categories), rare)
        for output, column in enumerate(categories.T):
            known = column >= 0
            classes = column[known].unique()
            bias[output, classes] = 0.0
            # Of a single value there is nothing to tell.
            if len(classes) < 2:
                continue
            regression = LogisticRegression(max_iter=MAX_ITERATIONS)
            regression.fit(inputs[known].cpu().numpy(), column[known].cpu().numpy())
            # Two values have one logit, that of the second.
            logits = classes[-len(regression.coef_) :]
            weight[output, logits] = torch.from_numpy(regression.coef_).to(weight)
            bias[output, logits] = torch.from_numpy(regression.intercept_).to(bias)
        self.register_buffer("weight", weight.flatten(0, 1))
        self.register_buffer("bias", bias.flatten())

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape `(..., num_discrete * num_categories)`.

        Args:
            features: Features of the parameters, of shape `(..., num_features)`.
        """
        return features @ self.weight.T + self.bias
