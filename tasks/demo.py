"""The demonstration: NPE and JeffreysNPE on the same simulations of two_moons."""

import math
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sbi.inference import NPE, simulate_for_sbi
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker
from sbi_jeffreys.metrics import c2st_many
from sbi_jeffreys.plots import FLOW, plot_training
from tasks import get_task
from tasks.reference import ReferenceDataError
from tasks.run import ctrl_c_ends
from tasks.task import Task

NUM_SIMULATIONS = 1_000
NUM_SAMPLES = 10_000
SEED = 1


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

    samples = {}
    for name, trainer in (("NPE", NPE), ("JeffreysNPE", JeffreysNPE)):
        torch.manual_seed(SEED)  # the same split, the same initial flow
        inference = trainer(
            task.prior,
            density_estimator="nsf",
            tracker=NoTracker(),
            show_progress_bars=False,
        )
        start = time.perf_counter()
        with ctrl_c_ends():
            inference.append_simulations(theta, x).train()
        seconds = time.perf_counter() - start
        print(f"\r{name}, trained {seconds:.0f} s")
        samples[name] = _score(inference.build_posterior(), observations)
        if isinstance(inference, JeffreysNPE):
            print(f"{name}, refined")
            refined = inference.build_posterior(sample_with="refined")
            samples[f"{name}, refined"] = _score(refined, observations)
            figure, _ = plot_training(inference.summary)
            _save(figure, folder / "training.png")
    print(
        "C2ST is sbibm's: 0.5 is perfect, 1.0 the worst. One seed says little: "
        "README.md has the averages."
    )
    x_o, reference = observations[0]
    figure = _crescents(task, x_o, reference, samples)
    _save(figure, folder / "posterior.png")


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


def _crescents(
    task: Task, x_o: Tensor, reference: Tensor, samples: dict[str, Tensor]
) -> Figure:
    """Plot samples of every posterior over the region that the exact one is in.

    The upper row shows all parameters of the prior, the lower one a crescent.
    """
    exact = task.reference_posterior(x_o)
    level = exact.log_prob(reference).quantile(0.05).item()
    crescent = reference[reference.sum(1) > 0]
    ends = (
        (-torch.ones(2), torch.ones(2)),
        (crescent.amin(0) - 0.1, crescent.amax(0) + 0.1),
    )
    figure, axes = plt.subplots(
        2,
        len(samples),
        figsize=(9, 6.4),
        sharex="row",
        sharey="row",
        layout="constrained",
    )
    for row, (low, high) in zip(axes, ends, strict=True):
        lines = [torch.linspace(low[d], high[d], 600) for d in range(2)]
        log_prob = exact.log_prob(torch.cartesian_prod(*lines)).reshape(600, 600).T
        for ax, draws in zip(row, samples.values(), strict=True):
            ax.scatter(*draws[:2000].T, s=2, color=FLOW, linewidths=0)
            ax.contour(
                *lines,
                log_prob.exp(),
                levels=[math.exp(level)],
                colors="black",
                linewidths=0.8,
            )
            ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
            ax.locator_params(nbins=3)
    for ax, name in zip(axes[0], samples, strict=True):
        ax.set_title(name)
    figure.supxlabel(r"$\theta_1$")
    figure.supylabel(r"$\theta_2$")
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Saved {path}.")
