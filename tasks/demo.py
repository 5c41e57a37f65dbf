"""The demonstration: NPE and JeffreysNPE on the same simulations of two_moons."""

import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sbi.analysis import pairplot
from sbi.inference import NPE, simulate_for_sbi
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker
from sbi_jeffreys.metrics import c2st
from sbi_jeffreys.plots import plot_training
from tasks import get_task
from tasks.reference import ReferenceDataError
from tasks.task import Task

NUM_SIMULATIONS = 1_000
NUM_SAMPLES = 10_000
SEED = 1
# Okabe and Ito's colours: reference, NPE, JeffreysNPE.
COLORS = ["black", "#E69F00", "#0072B2"]


def main(folder: Path = Path("demo")) -> None:
    """Train both methods, print their C2ST and save two plots.

    Args:
        folder: Folder of the plots, made if it is not there.
    """
    torch.set_num_threads(1)
    task = get_task("two_moons")
    torch.manual_seed(SEED)
    theta, x = simulate_for_sbi(
        task.simulator,
        task.prior,
        NUM_SIMULATIONS,
        show_progress_bar=False,
    )
    print(f"Simulated {task.name} {NUM_SIMULATIONS} times.")
    reference, x_o, source = _reference(task)
    print(f"Reference posterior of observation 1: {source}.")

    samples = {"reference": reference}
    for name, trainer in (("NPE", NPE), ("JeffreysNPE", JeffreysNPE)):
        torch.manual_seed(SEED)  # the same split, the same initial flow
        inference = trainer(
            task.prior,
            density_estimator="nsf",
            tracker=NoTracker(),
            show_progress_bars=False,
        )
        start = time.perf_counter()
        inference.append_simulations(theta, x).train()
        seconds = time.perf_counter() - start
        posterior = inference.build_posterior()
        draws = posterior.sample((NUM_SAMPLES,), x=x_o, show_progress_bars=False)
        samples[name] = draws
        print(f"\r{name:12} C2ST {c2st(reference, draws):.3f}, trained {seconds:.0f} s")
        if isinstance(inference, JeffreysNPE):
            refined = inference.build_posterior(sample_with="refined")
            draws = refined.sample((NUM_SAMPLES,), x=x_o)
            print(f"{'  refined':12} C2ST {c2st(reference, draws):.3f}")
            figure, _ = plot_training(inference.summary)
            _save(figure, folder / "training.png")
    print(
        "C2ST is sbibm's: 0.5 is perfect, 1.0 the worst. One seed and one observation "
        "say little; README.md has the averages."
    )
    _save(_corner(samples), folder / "posterior.png")


def _reference(task: Task) -> tuple[Tensor, Tensor, str]:
    """Return reference samples, observation, and where the samples come from."""
    try:
        reference = task.reference_posterior_samples(1)
        return reference, task.observation(1), "published with sbibm 1.1.0"
    except ReferenceDataError as error:
        # The observation is in the same download: simulate one.
        print(f"The published reference is not to be had.\n{error}")
        x_o = task.simulator(torch.tensor([[0.3, -0.2]]))
        reference = task.reference_posterior(x_o).sample(torch.Size((NUM_SAMPLES,)))
        return reference, x_o, "the task's closed form, at a simulated observation"


def _corner(samples: dict[str, Tensor]) -> Figure:
    pairplot(
        list(samples.values()),
        upper="scatter",
        diag="kde",
        labels=[r"$\theta_1$", r"$\theta_2$"],
        figsize=(6, 6),
        diag_kwargs=[{"mpl_kwargs": {"color": color}} for color in COLORS],
        upper_kwargs=[
            {"mpl_kwargs": {"color": color, "s": 1, "alpha": 0.2}} for color in COLORS
        ],
    )
    figure = plt.gcf()
    figure.legend(
        handles=[
            Line2D([], [], color=color, label=name)
            for name, color in zip(samples, COLORS, strict=True)
        ],
        loc="lower left",
        frameon=False,
    )
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Saved {path}.")
