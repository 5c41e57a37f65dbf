"""The pictures of docs/how_to/figures.md: ``python -m tasks.figures``."""

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sbi.diagnostics import run_sbc, run_tarp
from sbi.utils import BoxUniform
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker
from sbi_jeffreys.plots import (
    plot_c2st,
    plot_calibration,
    plot_corner,
    plot_densities,
    plot_training,
)
from tasks.report import published
from tasks.results import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tasks/reports/against_npe_1000/results.csv"
NUM_SIMULATIONS = 500
NUM_TESTS = 300
LABELS = [r"$\theta_1$", r"$\theta_2$"]
METHODS = {
    "npe_nsf": "NPE (nsf)",
    "jeffreys": "JeffreysNPE, the flow",
    "jeffreys_refined": "JeffreysNPE, refined",
}


def simulator(theta: Tensor) -> Tensor:
    """Lose the sign of the first parameter: the posterior has two modes."""
    mean = torch.stack((theta[:, 0].square(), theta[:, 1]), dim=1)
    return mean + torch.tensor([0.15, 0.3]) * torch.randn_like(mean)


def of_a_training() -> Iterator[tuple[str, Figure]]:
    """Train on a toy and draw the training, both models, posteriors, calibration.

    Yields:
        Name and picture.
    """
    torch.manual_seed(1)
    prior = BoxUniform(-1.5 * torch.ones(2), 1.5 * torch.ones(2))
    theta = prior.sample(torch.Size((NUM_SIMULATIONS,)))
    # One flow, of a kind that is bad at two modes, so that there is something to see.
    inference = JeffreysNPE(prior, "maf", tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(theta, simulator(theta)).train()
    yield "training", plot_training(inference.summary)[0]

    theta_o = torch.tensor([[0.9, 0.3]])
    x_o = simulator(theta_o)
    posteriors = {
        "flow": inference.build_posterior(),
        "refined": inference.build_posterior(sample_with="refined"),
    }
    limits = [[-1.5, 1.5], [-1.0, 1.5]]
    figure, _ = plot_densities(
        posteriors["flow"], x_o, limits=limits, points=theta_o, labels=LABELS
    )
    yield "densities", figure

    samples = {
        name: posterior.sample((2000,), x=x_o, show_progress_bars=False)
        for name, posterior in posteriors.items()
    }
    figure, _ = plot_corner(samples, points=theta_o, limits=limits, labels=LABELS)
    yield "corner", figure

    theta = prior.sample(torch.Size((NUM_TESTS,)))
    x = simulator(theta)
    options = {"num_posterior_samples": 200, "show_progress_bar": False}
    ranks = {k: run_sbc(theta, x, p, **options)[0] for k, p in posteriors.items()}
    coverage = {k: run_tarp(theta, x, p, **options) for k, p in posteriors.items()}
    figure, _ = plot_calibration(ranks, coverage, 200, labels=LABELS)
    yield "calibration", figure


def of_the_benchmark() -> Iterator[tuple[str, Figure]]:
    """Draw C2ST on two_moons: the committed rows, and the published figures.

    Yields:
        Name and picture.
    """
    theirs = published().query("source == 'lueckmann2021' and task == 'two_moons'")
    c2st = {
        f"{method}, published": theirs[theirs["method"] == method]
        .set_index("budget")["c2st_mean"]
        .to_dict()
        for method in ("NPE", "SNPE")
    }
    rows = load(RESULTS).query("task == 'two_moons'")
    for method, name in METHODS.items():
        of_seeds = rows[rows["method"] == method].groupby(["budget", "seed"])["c2st"]
        by_budget = of_seeds.mean().groupby("budget")
        c2st[name] = {budget: list(part) for budget, part in by_budget}
    yield "c2st", plot_c2st(c2st)[0]


def main(arguments: list[str] | None = None) -> None:
    """Draw all pictures.

    Args:
        arguments: Those of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs/how_to/figures",
        help="folder (default docs/how_to/figures)",
    )
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, figure in chain(of_a_training(), of_the_benchmark()):
        figure.savefig(out / f"{name}.png", dpi=80)
        plt.close(figure)
        print(f"Saved {out / name}.png.")


if __name__ == "__main__":
    main()
