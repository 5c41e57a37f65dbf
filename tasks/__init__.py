"""Benchmark tasks of sbi_jeffreys, used from the clone as ``python -m tasks``."""

from tasks.bernoulli_glm import BernoulliGLM
from tasks.bernoulli_glm_raw import BernoulliGLMRaw
from tasks.gaussian_linear import GaussianLinear
from tasks.gaussian_linear_uniform import GaussianLinearUniform
from tasks.gaussian_mixture import GaussianMixture
from tasks.lotka_volterra import LotkaVolterra
from tasks.sir import SIR
from tasks.slcp import SLCP
from tasks.slcp_distractors import SLCPDistractors
from tasks.task import Task
from tasks.two_moons import TwoMoons

__all__ = ["TASKS", "Task", "get_task"]

_CLASSES: dict[str, type[Task]] = {
    cls.name: cls
    for cls in (
        TwoMoons,
        GaussianMixture,
        GaussianLinear,
        GaussianLinearUniform,
        SLCP,
        SLCPDistractors,
        BernoulliGLM,
        BernoulliGLMRaw,
        SIR,
        LotkaVolterra,
    )
}

TASKS: tuple[str, ...] = tuple(_CLASSES)


def get_task(name: str) -> Task:
    """Return the benchmark task called `name`.

    Raises:
        ValueError: If there is none of that name; the message lists `TASKS`.
    """
    if name not in _CLASSES:
        raise ValueError(
            f"There is no task {name!r}. The tasks are {', '.join(TASKS)}."
        )
    return _CLASSES[name]()
