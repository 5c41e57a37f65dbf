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
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker
from sbi_jeffreys.metrics import c2st_many
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
    observations, source = _observations(task)
    print(f"Reference posteriors: {source}.")

    samples = {"reference": observations[0][1]}
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
        print(f"\r{name}, trained {seconds:.0f} s")
        samples[name] = _score(inference.build_posterior(), observations)
        if isinstance(inference, JeffreysNPE):
            print(f"{name}, refined")
            _score(inference.build_posterior(sample_with="refined"), observations)
            figure, _ = plot_training(inference.summary)
            _save(figure, folder / "training.png")
    print(
        "C2ST is sbibm's: 0.5 is perfect, 1.0 the worst. One seed says little: "
        "README.md has the averages."
    )
    _save(_corner(samples), folder / "posterior.png")


def _observations(task: Task) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """Return observations with reference samples, and where these come from."""
    try:
        return [
            (task.observation(n), task.reference_posterior_samples(n)[:NUM_SAMPLES])
            for n in range(1, 11)
        ], "published with sbibm 1.1.0"
    except ReferenceDataError as error:
        # The observations are in the same download: simulate one.
        print(f"The published references are not to be had.\n{error}")
        x_o = task.simulator(torch.tensor([[0.3, -0.2]]))
        reference = task.reference_posterior(x_o).sample(torch.Size((NUM_SAMPLES,)))
        return [(x_o, reference)], "the task's closed form, at a simulated observation"


def _score(
    posterior: NeuralPosterior, observations: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Print C2ST and return the samples of the first observation."""
    draws = [
        posterior.sample((NUM_SAMPLES,), x=x_o, show_progress_bars=False)
        for x_o, _ in observations
    ]
    scores = c2st_many([
        (reference, sample)
        for (_, reference), sample in zip(observations, draws, strict=True)
    ])
    print(
        f"  C2ST {scores[0]:.3f} at observation 1, {scores.mean():.3f} in the mean "
        f"of {len(scores)}"
    )
    return draws[0]


def _corner(samples: dict[str, Tensor]) -> Figure:
    """Plot the reference's contour below the samples of both methods."""
    few = [draws[:2000] for draws in samples.values()]
    pairplot(
        few,
        upper=["contour", "scatter", "scatter"],
        diag="kde",
        limits=[[-1.0, 1.0]] * 2,
        labels=[r"$\theta_1$", r"$\theta_2$"],
        figsize=(7, 7),
        diag_kwargs=[
            {"bw_method": 0.05, "bins": 400, "mpl_kwargs": {"color": color}}
            for color in COLORS
        ],
        upper_kwargs=[
            {
                "bw_method": 0.05,
                "bins": 400,
                "levels": [0.95],
                "mpl_kwargs": {"colors": [COLORS[0]]},
            },
            {"mpl_kwargs": {"color": COLORS[1], "s": 5, "alpha": 0.8}},
            {"mpl_kwargs": {"color": COLORS[2], "s": 5, "alpha": 0.8}},
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
