r"""How often `check_fit` objects: good and bad observations of the benchmark's tasks.

    python -m tasks.studies.alarms --out alarms.csv --seeds 31 32
    python -m tasks.studies.alarms --out alarms.csv --report

`JeffreysNPE` is trained with all defaults on simulations that are none of the
benchmark's, and `check_fit` asked about observations of three kinds, which it has not
seen:

- good: simulations;
- noisy: simulations with the standard deviation of each output added as noise, as of a
  simulator that leaves a source of noise out;
- far: simulations moved by ten standard deviations of each output.

A noisy observation is no impossible one: where a simulator has few outputs, each with
much spread, hardly anything can tell it from a good one. Nor is the posterior at a good
observation good, if the flow is not calibrated, to which `check_fit` objects at every
observation: whether it is right is seen by the share of the parameters of 500 further
simulations that lie in the flow's 90 % credible regions.
"""

import math
import sys
import warnings
from collections import Counter
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker, check_fit, compare_models
from tasks import get_task
from tasks.report import markdown_table
from tasks.studies.rows import run_trainings

NUM_OBSERVATIONS = 100
NUM_FRESH = 500
# What `check_fit` objects to, where no network reads the outputs first.
OBJECTIONS = ("novelty", "disagreement", "calibration")


def observations(x: Tensor, fresh: Tensor) -> dict[str, Tensor]:
    """Return observations of every kind.

    Args:
        x: Outputs of the simulations of the training, shape (num, dim_data).
        fresh: Outputs of others, shape (num_observations, dim_data).
    """
    std = x.std(0)
    return {
        "good": fresh,
        "noisy": fresh + std * torch.randn_like(fresh),
        "far": fresh + 10 * std,
    }


def run(task_name: str, budget: int, seed: int) -> list[dict[str, Any]]:
    """Train once, and return a row for each kind of observation."""
    task = get_task(task_name)
    torch.manual_seed(9000 + seed)
    theta = task.prior.sample((budget + NUM_OBSERVATIONS,))
    x = task.simulator(theta)
    inference = JeffreysNPE(task.prior, tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(theta[:budget], x[:budget])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        inference.train()
        comparison = compare_models(inference)
        checks = {
            kind: [check_fit(inference, x_o, comparison) for x_o in x_os]
            for kind, x_os in observations(x[:budget], x[budget:]).items()
        }
        fresh = task.prior.sample((NUM_FRESH,))
        held_out = compare_models(inference, held_out=(fresh, task.simulator(fresh)))
    rows = []
    for kind, of_kind in checks.items():
        objections = Counter(name for check in of_kind for name in check.objections)
        rows.append({
            "task": task_name,
            "budget": budget,
            "seed": seed,
            "kind": kind,
            "objected": sum(not check.trusted for check in of_kind) / len(of_kind),
            "coverage_90": (held_out.levels <= 0.9).float().mean().item(),
            **{name: objections[name] / len(of_kind) for name in OBJECTIONS},
        })
    return rows


def report(rows: pd.DataFrame) -> str:
    """Return Markdown tables: shares objected to, and what is objected to."""
    parts = []
    for budget, part in rows.groupby("budget"):
        shares = part.pivot_table("objected", "task", "kind", sort=False)
        shares["90 % regions hold"] = part.groupby("task")["coverage_90"].mean()
        shares.loc["**mean**"] = shares.mean(skipna=False)
        why = part.pivot_table(list(OBJECTIONS), "kind", sort=False)
        num_trainings = len(part.drop_duplicates(["task", "seed"]))
        most = part[part["kind"] == "good"]["objected"].max()
        parts.append(
            f"{budget} simulations, {num_trainings} trainings with "
            f"{part['seed'].nunique()} seed(s), {NUM_OBSERVATIONS} observations of "
            "each kind: the share that `check_fit` objects to, in the mean over the "
            f"seeds. The largest share of a training's good ones is {most:.0%}.\n\n"
            + _markdown(shares.reset_index())
            + "\n\nWhat it objects to, in the mean over the trainings; it may be more "
            "than one thing:\n\n"
            + _markdown(why.reset_index().reindex(columns=["kind", *OBJECTIONS]))
        )
    return "\n\n".join(parts)


def _markdown(shares: pd.DataFrame) -> str:
    lines = [
        [str(name), *("–" if math.isnan(value) else f"{value:.1%}" for value in row)]
        for name, *row in shares.itertuples(index=False)
    ]
    return markdown_table(list(map(str, shares.columns)), lines)


if __name__ == "__main__":
    sys.exit(run_trainings("How often check_fit objects.", (31, 32), run, report))
