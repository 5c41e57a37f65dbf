r"""Ablations: what each part of `JeffreysNPE` is worth, on fresh simulations.

    python -m tasks.studies.ablation --out ablation.csv
    python -m tasks.studies.ablation --out ablation.csv --report

C2ST needs reference posteriors, and says little about a single change before many
observations and seeds. Here every variant is trained on the same simulations and judged
by the density that it gives to the parameters of fresh simulations,

.. math:: -\mathbb{E}_\pi[\log p(\theta \mid x)] = \mathrm{KL}(\pi \Vert p) + H(\pi),

in nats: the difference of two variants is a difference of divergences, paired over
simulations, whatever the entropy. The simulations and seeds are none of the
benchmark's, and its observations are not used, so that settings may be chosen here.

Densities are those within the prior's support, as the posteriors are sampled. Where a
density needs a normalising constant (proxy and refined posterior), it is estimated from
samples of flow and prior together with the parameters themselves: what the samples miss
can then only make a model look worse than it is.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.utils import within_support
from torch import Tensor
from torch.distributions import Distribution

from sbi_jeffreys import (
    FixedWeights,
    JeffreysEstimator,
    JeffreysNPE,
    JeffreysObjective,
    NoTracker,
    energy_nn,
)
from sbi_jeffreys.partition import log_mixture
from sbi_jeffreys.refinement import log_ratio, sample_with_log_ratio, temper
from sbi_jeffreys.trainer import LEARNING_RATE
from tasks import TASKS, get_task
from tasks.report import markdown_table
from tasks.results import Row
from tasks.studies.rows import positive, run_study

NUM_FRESH = 500
NUM_SAMPLES = 300


@dataclass(frozen=True)
class Variant:
    """A trainer with its settings.

    Args:
        trainer: The trainer's class.
        keywords: Makes the arguments of its constructor besides the prior.
        train: Arguments of its `train`.
    """

    trainer: type[NPE]
    keywords: Callable[[], dict[str, Any]] = dict
    train: dict[str, Any] = field(default_factory=dict)


def _without_likelihoods(
    train: dict[str, Any] | None = None, **keywords: Any
) -> Variant:
    """Return a variant whose proxy has no surrogates of the likelihood."""
    return Variant(
        JeffreysNPE,
        lambda: {"energy_estimator": energy_nn(likelihood="none"), **keywords},
        train or {},
    )


class UnscaledJeffreysNPE(JeffreysNPE):
    """`JeffreysNPE` whose flow keeps the base distribution that it has learnt with."""

    def _fit_scale_of_flow(self) -> None:
        pass


# Those "without likelihoods" have a proxy that is one energy network: what its network,
# the flow and the schedule are worth was measured with them.
class InSampleJeffreysNPE(JeffreysNPE):
    """JeffreysNPE that learns from residuals as the regression was fitted to them."""

    @property
    def _was_built_with_these(self) -> bool:
        return False


def _maf_alone(trainer: type[JeffreysNPE]) -> Variant:
    """Return the stage of a flow that is no choice of several, without a proxy."""
    return Variant(
        trainer,
        lambda: {
            "density_estimator": "maf",
            "weights": FixedWeights((1.0, 0.0, 0.0)),
        },
    )


VARIANTS: dict[str, Variant] = {
    "jeffreys": Variant(JeffreysNPE),
    "without the flow's scale": Variant(UnscaledJeffreysNPE),
    "residuals in sample": Variant(InSampleJeffreysNPE),
    "jeffreys, fast": Variant(JeffreysNPE, lambda: {"preset": "fast"}),
    "without likelihoods": _without_likelihoods(),
    "without likelihoods, maf": _without_likelihoods(density_estimator="maf"),
    "without likelihoods, nsf": _without_likelihoods(density_estimator="nsf"),
    "without likelihoods, weights fixed": _without_likelihoods(weights="fixed"),
    "without likelihoods, flow without residual coordinates": Variant(
        JeffreysNPE,
        lambda: {
            "density_estimator": posterior_nn("maf"),
            "energy_estimator": energy_nn(likelihood="none"),
        },
    ),
    "without likelihoods, proxy without dropout": Variant(
        JeffreysNPE,
        lambda: {"energy_estimator": energy_nn(dropout=0.0, likelihood="none")},
    ),
    "without likelihoods, half the samples": _without_likelihoods(
        objective=JeffreysObjective(8, 8)
    ),
    "without likelihoods, fast": _without_likelihoods(preset="fast"),
    "without likelihoods, fast with all samples": _without_likelihoods(
        preset="fast", objective=JeffreysObjective()
    ),
    "without likelihoods, half the patience": _without_likelihoods(
        train={"stop_after_epochs": 10}
    ),
    "without likelihoods, sbi's learning rate": _without_likelihoods(
        train={"learning_rate": 5e-4}
    ),
    "the flow's stage alone": Variant(
        JeffreysNPE, lambda: {"weights": FixedWeights((1.0, 0.0, 0.0))}
    ),
    "the flow's stage alone, maf": _maf_alone(JeffreysNPE),
    "the flow's stage alone, maf, residuals in sample": _maf_alone(InSampleJeffreysNPE),
    "npe, maf": Variant(NPE, lambda: {"density_estimator": "maf"}),
    "npe, nsf": Variant(NPE, lambda: {"density_estimator": "nsf"}),
    "npe, nsf, our learning rate": Variant(
        NPE,
        lambda: {"density_estimator": "nsf"},
        train={"learning_rate": LEARNING_RATE},
    ),
}


def held_out_losses(
    estimator: Any, prior: Distribution, theta: Tensor, x: Tensor
) -> dict[str, Tensor]:
    """Return the negative log densities of fresh parameters under every model.

    Args:
        estimator: What `train` returned.
        prior: The prior.
        theta: Parameters of shape (num, dim_parameters).
        x: Their simulations, shape (num, dim_data).

    Returns:
        Losses of shape (num,) of the `"flow"`, and for a `JeffreysEstimator` of its
        `"proxy"` and of the `"refined"` posterior.
    """
    with torch.no_grad():
        log_flow = estimator.log_prob(theta.unsqueeze(0), x)
        if not isinstance(estimator, JeffreysEstimator):
            samples = estimator.sample((NUM_SAMPLES,), x)
            inside = within_support(prior, samples.flatten(0, 1))
            return {"flow": _within(log_flow[0], inside.reshape(NUM_SAMPLES, -1))}
        flow, proxy = estimator.flow, estimator.proxy
        samples, log_w = sample_with_log_ratio(flow, proxy, NUM_SAMPLES, x)
        log_w = torch.cat((log_ratio(flow, proxy, theta.unsqueeze(0), x), log_w))
        refined = temper(log_w, estimator.exponent)
        log_normaliser = torch.logsumexp(refined, 0) - math.log(1 + NUM_SAMPLES)

        base = proxy.base
        references = base.sample(NUM_SAMPLES, len(x))
        points = torch.cat((theta.unsqueeze(0), samples, references))
        log_b = base.log_prob(points)
        log_m = log_mixture(
            estimator.log_prob(points, x),
            base.reference_log_prob(points),
            NUM_SAMPLES,
            NUM_SAMPLES,
        )
        log_unnormalized = log_b + proxy(points, x)
        log_z = torch.logsumexp(log_unnormalized - log_m, 0) - math.log(len(points))
        return {
            "flow": _within(log_flow[0], ~torch.isneginf(log_w[1:])),
            "proxy": log_z - log_unnormalized[0],
            "refined": log_normaliser - log_flow[0] - refined[0],
        }


def _within(log_prob: Tensor, inside: Tensor) -> Tensor:
    """Return the loss of a flow that is sampled within the prior's support."""
    accepted = inside.float().mean(0).clamp_min(0.5 / len(inside))
    return accepted.log() - log_prob


def held_out_levels(
    estimator: Any, prior: Distribution, theta: Tensor, x: Tensor
) -> dict[str, Tensor]:
    """Return the probabilities of the regions on whose edges fresh parameters lie.

    They are the regions of highest density. If a posterior knows how much it does not
    know, the levels are uniform.

    Args:
        estimator: What `train` returned.
        prior: The prior.
        theta: Parameters of shape (num, dim_parameters).
        x: Their simulations, shape (num, dim_data).

    Returns:
        Levels of shape (num,) of the `"flow"` within the prior's support, and for a
        `JeffreysEstimator` of the `"refined"` posterior.
    """
    with torch.no_grad():
        points = torch.cat((theta.unsqueeze(0), estimator.sample((NUM_SAMPLES,), x)))
        log_flow = estimator.log_prob(points, x)
        inside = within_support(prior, points.flatten(0, 1)).reshape(log_flow.shape)
        log_weights = {"flow": torch.where(inside, 0.0, -torch.inf)}
        if isinstance(estimator, JeffreysEstimator):
            log_w = log_ratio(estimator.flow, estimator.proxy, points, x)
            log_weights["refined"] = temper(log_w, estimator.exponent)
        levels = {}
        for model, weights in log_weights.items():
            is_denser = (log_flow + weights)[1:] > (log_flow + weights)[0]
            levels[model] = (torch.softmax(weights[1:], 0) * is_denser).sum(0)
        return levels


def run(task_name: str, variant: str, budget: int, seed: int) -> list[dict[str, Any]]:
    """Train a variant and return a row for each of its models.

    The seconds are those of the processor.
    """
    task = get_task(task_name)
    torch.manual_seed(9000 + seed)
    theta = task.prior.sample((budget + NUM_FRESH,))
    x = task.simulator(theta)
    method = VARIANTS[variant]
    inference = method.trainer(
        task.prior, tracker=NoTracker(), show_progress_bars=False, **method.keywords()
    )
    inference.append_simulations(theta[:budget], x[:budget])
    torch.manual_seed(seed)
    start = time.process_time()  # which other work on the machine moves less
    estimator = inference.train(**method.train)
    seconds = time.process_time() - start
    fresh = theta[budget:], x[budget:]
    losses = held_out_losses(estimator, task.prior, *fresh)
    levels = held_out_levels(estimator, task.prior, *fresh)
    return [
        {
            "task": task_name,
            "variant": variant,
            "budget": budget,
            "seed": seed,
            "model": model,
            "loss": loss.mean().item(),
            "standard_error": loss.std().item() / math.sqrt(len(loss)),
            "coverage_90": (levels[model] <= 0.9).float().mean().item()
            if model in levels
            else math.nan,
            "seconds": seconds,
        }
        for model, loss in losses.items()
    ]


def report(rows: pd.DataFrame) -> str:
    """Return Markdown tables of the losses, and of coverage where it was measured."""
    parts = []
    for budget, part in rows.groupby("budget"):
        table = part.pivot_table(
            index=["variant", "model"], columns="task", values="loss", sort=False
        )
        table["mean"] = table.mean(axis=1, skipna=False)
        table["seconds"] = part.groupby(["variant", "model"])["seconds"].mean()
        parts.append(
            f"{budget} simulations, {part['seed'].nunique()} seed(s)\n\n"
            + _markdown(table.reset_index())
        )
        if "coverage_90" in part and part["coverage_90"].notna().any():
            coverage = part.dropna(subset=["coverage_90"]).pivot_table(
                index=["variant", "model"],
                columns="task",
                values="coverage_90",
                sort=False,
            )
            parts.append(
                "Share of the fresh parameters in the posterior's 90 % regions of "
                "highest density\n\n" + _markdown(coverage.reset_index())
            )
    return "\n\n".join(parts)


def _markdown(table: pd.DataFrame) -> str:
    lines = [
        [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row]
        for row in table.itertuples(index=False)
    ]
    return markdown_table(list(map(str, table.columns)), lines)


def main() -> int:
    """Run what is not in the file yet, or report what is.

    Returns:
        The exit status: 0; 2 for wrong input; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(description="Ablations of JeffreysNPE.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS)
    )
    parser.add_argument("--budget", type=positive, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])

    def keys(options: argparse.Namespace) -> list[Row]:
        return [
            {"task": task, "variant": variant, "budget": options.budget, "seed": seed}
            for seed in options.seeds
            for task in options.tasks
            for variant in options.variants
        ]

    return run_study(parser, keys, run, report)


if __name__ == "__main__":
    sys.exit(main())
