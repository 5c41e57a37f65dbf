r"""Calibration: whether JeffreysNPE's accuracy costs coverage.

    python -m tasks.studies.calibration --out calibration.csv
    python -m tasks.studies.calibration --out calibration.csv --report

NPE and JeffreysNPE are trained on the same simulations of every task. On fresh
simulations, none of them the benchmark's, two errors of each posterior's coverage are
measured, both zero for the true posterior up to the noise of so few simulations:

- `tarp`: the largest distance of the expected coverage probability from the diagonal,
  by sbi's `run_tarp` with its random reference points;
- `marginal`: the largest distance of the distribution of the marginal ranks from the
  uniform one, of the worst parameter (the statistic of Kolmogorov and Smirnov), from
  sbi's `run_sbc`.

`atc`, the area between expected coverage and diagonal above one half, tells by its sign
whether a posterior is too narrow (negative) or too wide.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sbi.diagnostics import check_tarp, run_sbc, run_tarp
from sbi.inference import NPE
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker
from tasks import TASKS, get_task
from tasks.report import markdown_table
from tasks.results import write_whole

NUM_SAMPLES = 200
METRICS = ("tarp", "atc", "marginal")

TRAINERS: dict[str, Callable[..., Any]] = {
    "npe, maf": lambda **kwargs: NPE(density_estimator="maf", **kwargs),
    "npe, nsf": lambda **kwargs: NPE(density_estimator="nsf", **kwargs),
    "jeffreys": lambda **kwargs: JeffreysNPE(**kwargs),
}


def coverage_errors(posterior: Any, theta: Tensor, x: Tensor) -> dict[str, float]:
    """Return the errors of a posterior's coverage.

    Args:
        posterior: A posterior of sbi's interface.
        theta: Parameters of shape (num, dim_parameters).
        x: Their simulations, shape (num, dim_data).
    """
    arguments = {"num_posterior_samples": NUM_SAMPLES, "show_progress_bar": False}
    coverage, alpha = run_tarp(theta, x, posterior, **arguments)
    atc, _ = check_tarp(coverage, alpha)
    ranks, _ = run_sbc(theta, x, posterior, **arguments)
    levels = torch.arange(NUM_SAMPLES + 1)
    below = (ranks.unsqueeze(-1) <= levels).float().mean(0)
    uniform = (levels + 1) / (NUM_SAMPLES + 1)
    return {
        "tarp": (coverage - alpha).abs().max().item(),
        "atc": atc,
        "marginal": (below - uniform).abs().max().item(),
    }


def run(
    task_name: str, trainer: str, budget: int, seed: int, num_fresh: int
) -> list[dict[str, Any]]:
    """Train one trainer and return a row for each of its posteriors."""
    task = get_task(task_name)
    torch.manual_seed(7000 + seed)
    theta = task.prior.sample((budget + num_fresh,))
    x = task.simulator(theta)
    inference = TRAINERS[trainer](
        prior=task.prior, tracker=NoTracker(), show_progress_bars=False
    )
    inference.append_simulations(theta[:budget], x[:budget])
    torch.manual_seed(seed)
    inference.train()
    posteriors = {trainer: inference.build_posterior()}
    if isinstance(inference, JeffreysNPE):
        refined = inference.build_posterior(sample_with="refined")
        posteriors = {"jeffreys, flow": posteriors[trainer], "refined": refined}
    rows = []
    for name, posterior in posteriors.items():
        torch.manual_seed(seed)
        errors = coverage_errors(posterior, theta[budget:], x[budget:])
        key = {"task": task_name, "trainer": trainer, "posterior": name}
        rows.append({**key, "budget": budget, "seed": seed, **errors})
    return rows


def report(table: pd.DataFrame) -> str:
    """Return the mean errors of every task and posterior as Markdown."""
    parts = []
    for metric in METRICS:
        means = table.pivot_table(index="task", columns="posterior", values=metric)
        means.loc["mean"] = means.mean()
        header = ["task", *map(str, means.columns)]
        lines = [
            [str(task), *map("{:.3f}".format, values)]
            for task, values in zip(means.index, means.to_numpy(), strict=True)
        ]
        parts += [f"### {metric}", "", markdown_table(header, lines), ""]
    return "\n".join(parts)


def main() -> None:
    """Run the study from the command line; what is in the table is not run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the table, CSV")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--budget", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[301])
    parser.add_argument("--fresh", type=int, default=500, help="fresh simulations")
    parser.add_argument("--report", action="store_true", help="only print the means")
    arguments = parser.parse_args()
    rows = []
    if arguments.out.exists():
        rows = pd.read_csv(arguments.out).to_dict("records")
    if not arguments.report:
        torch.set_num_threads(1)
        for task in arguments.tasks:
            for seed in arguments.seeds:
                for trainer in TRAINERS:
                    key = (task, trainer, arguments.budget, seed)
                    done = {
                        (r["task"], r["trainer"], r["budget"], r["seed"]) for r in rows
                    }
                    if key in done:
                        continue
                    rows += run(*key, num_fresh=arguments.fresh)
                    text = pd.DataFrame(rows).to_csv(index=False)
                    write_whole(arguments.out, text)
    print(report(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
