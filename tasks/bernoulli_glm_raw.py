"""Bernoulli GLM raw: the filter of a neuron, from its spikes themselves."""

from torch import Tensor

from tasks.bernoulli_glm import DURATION, BernoulliGLM, design_matrix, simulate_spikes


class BernoulliGLMRaw(BernoulliGLM):
    r"""The spikes of `BernoulliGLM` instead of their sufficient statistics.

    The data are $y \in \{0, 1\}^{100}$. Prior and posterior are those of
    `BernoulliGLM`.

    Reference:
        Lueckmann et al. (2021), "Benchmarking Simulation-Based Inference".
    """

    name = "bernoulli_glm_raw"
    dim_data = DURATION
    observation_file = "observation_raw"

    def _simulate(self, theta: Tensor) -> Tensor:
        return simulate_spikes(theta)

    def _log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        return super()._log_likelihood(theta, x @ design_matrix())
