r"""What repeated samples cost: C2ST of the refined posterior with itself.

    python -m tasks.studies.repetitions --out repetitions.csv --seeds 31
    python -m tasks.studies.repetitions --out repetitions.csv --report

The refined posterior resamples the flow. Where its weights are uneven it takes the same
samples again and again, and parts them by Metropolis moves. Here samples are drawn at
observations that were not trained on, and told by a classifier from others of the same
posterior that are nearly independent: a random third of three times as many, drawn with
candidates and moves in plenty. 0.5 is the best there is, and what such samples reach
among themselves.

- as it is: by default;
- without moves: `num_moves=0`;
- resampling alone: `oversampling_factor=2` and no moves, also where few samples are
  asked for.

How few samples fare is not measured here, but by tests, where the posterior is known.
"""

import math
import sys
import time
import warnings
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker, RefinedPosterior
from sbi_jeffreys.metrics import c2st_many
from tasks import get_task
from tasks.report import markdown_table
from tasks.studies.rows import run_trainings

NUM_OBSERVATIONS = 8
NUM_SAMPLES = 2_000
# For samples that are nearly independent.
PLENTY = {"oversampling_factor": 20, "num_moves": 40}
VARIANTS: dict[str, dict[str, int]] = {
    "as it is": {},
    "without moves": {"num_moves": 0},
    "resampling alone": {
        "oversampling_factor": 2,
        "num_moves": 0,
        "cheap_num_samples": 0,
    },
}
INDEPENDENT = "independent"


def run(task_name: str, budget: int, seed: int) -> list[dict[str, Any]]:
    """Train once, and return a row for each variant."""
    task = get_task(task_name)
    torch.manual_seed(9000 + seed)
    theta = task.prior.sample((budget + NUM_OBSERVATIONS,))
    x = task.simulator(theta)
    inference = JeffreysNPE(task.prior, tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(theta[:budget], x[:budget])
    samples: dict[str, list[tuple[Tensor, Tensor]]] = {
        name: [] for name in (*VARIANTS, INDEPENDENT)
    }
    seconds = {**dict.fromkeys(VARIANTS, 0.0), INDEPENDENT: math.nan}
    repeated = dict.fromkeys(samples, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        inference.train()
        plenty = _posterior(inference, **PLENTY)
        for x_o in x[budget:].split(1):
            many = plenty.sample((3 * NUM_SAMPLES,), x=x_o)
            many = many[torch.randperm(len(many))]
            reference, other = many[:NUM_SAMPLES], many[NUM_SAMPLES:][:NUM_SAMPLES]
            samples[INDEPENDENT].append((reference, other))
            for name, parameters in VARIANTS.items():
                posterior = _posterior(inference, **parameters)
                start = time.process_time()
                drawn = posterior.sample((NUM_SAMPLES,), x=x_o)
                seconds[name] += (time.process_time() - start) / NUM_OBSERVATIONS
                samples[name].append((reference, drawn))
            for name, pairs in samples.items():
                share = 1 - len(pairs[-1][1].unique(dim=0)) / NUM_SAMPLES
                repeated[name] += share / NUM_OBSERVATIONS
    return [
        {
            "task": task_name,
            "budget": budget,
            "seed": seed,
            "variant": name,
            "c2st": c2st_many(pairs).mean().item(),
            "repeated": repeated[name],
            "seconds": seconds[name],
        }
        for name, pairs in samples.items()
    ]


def _posterior(
    inference: JeffreysNPE,
    cheap_num_samples: int = RefinedPosterior.cheap_num_samples,
    **parameters: int,
) -> RefinedPosterior:
    posterior = inference.build_posterior(
        sample_with="refined", refined_sampling_parameters=parameters
    )
    assert isinstance(posterior, RefinedPosterior)
    posterior.cheap_num_samples = cheap_num_samples
    return posterior


def report(rows: pd.DataFrame) -> str:
    """Return Markdown tables: C2ST of each variant, its repetitions and seconds."""
    parts = []
    for budget, of_budget in rows.groupby("budget"):
        lines = []
        for task, part in of_budget.groupby("task", sort=False):
            means = part.pivot_table(["c2st", "repeated", "seconds"], "variant")
            of_variant = means.to_dict("index")
            cells = [f"{of_variant[INDEPENDENT]['c2st']:.3f}"]
            for name in VARIANTS:
                row = of_variant[name]
                cells += [
                    f"{row['c2st']:.3f}",
                    f"{row['repeated']:.1%}",
                    f"{row['seconds']:.2f}",
                ]
            lines.append([f"`{task}`", *cells])
        columns = [cell for name in VARIANTS for cell in (name, "repeated", "seconds")]
        seeds = ", ".join(map(str, sorted(of_budget["seed"].unique())))
        parts.append(
            f"{NUM_SAMPLES:,} samples at each of {NUM_OBSERVATIONS} observations, one "
            f"training of {budget:,} simulations for each seed ({seeds}): C2ST, the "
            "share of samples that repeat others, and seconds of the processor for one "
            "observation.\n\n"
            + markdown_table(["task", "independent samples", *columns], lines)
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(run_trainings("What repeated samples cost.", (31,), run, report))
