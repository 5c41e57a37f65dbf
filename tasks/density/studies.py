"""The studies: which methods are fitted to which samples, and how.

They are small, so that all of them fit one processor core in less than an hour.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.density.baselines import Training
from tasks.density.methods import curve_text, fit, mean_nll
from tasks.density.networks import Networks
from tasks.density.sets import SETS, planar_density
from tasks.density.table import Run
from tasks.density.tables import TABLES, split_table
from tasks.errors import InputError
from tasks.results import write_whole

NUM_TEST = 2_000
# The seed whose density maps are kept for the plots, and their resolution.
MAP_SEED = 1
MAP_SIZE = 80
# Weights of the penalty form: the forward divergence has one, the others five each.
# A common factor does not matter to Adam.
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        datasets: Names of the data: 2-D densities or tables.
        cells: Methods with their settings: empty, or `lr=` a learning rate, or
            `weights=` three weights with colons.
        training: Epochs, batch size and learning rate of all methods; ours takes as
            many epochs for each of its stages.
        networks: Their networks.
        num_training: Number of samples, a tenth of which is for validation; of tables
            all of the split.
    """

    datasets: Sequence[str]
    cells: Sequence[tuple[str, str]]
    training: Training
    networks: Networks
    num_training: int = 0

    def runs(self, name: str, seeds: Sequence[int]) -> list[Run]:
        """Return the runs of the study, seed by seed."""
        return [
            Run(name, dataset, method, setting, seed)
            for seed in seeds
            for dataset in self.datasets
            for method, setting in self.cells
        ]


STUDIES = {
    "dual_vs_penalty": Study(
        datasets=("gaussian_mixture",),
        cells=(
            ("nf", ""),
            ("jeffreys", ""),
            ("dual", ""),
            *(
                ("penalty", f"weights=1:{reverse:g}:{proxy:g}")
                for reverse in PENALTIES
                for proxy in PENALTIES
            ),
        ),
        training=Training(epochs=150, batch_size=180, learning_rate=5e-3),
        networks=Networks(),
        num_training=200,
    ),
    "stability": Study(
        datasets=("gaussian_mixture",),
        cells=tuple(
            (method, f"lr={rate:g}")
            for rate in (1e-3, 2e-2)
            for method in ("nf", "wgan", "jeffreys", "dual")
        ),
        training=Training(epochs=300, batch_size=270, learning_rate=1e-3),
        networks=Networks(),
        num_training=300,
    ),
    "planar": Study(
        datasets=tuple(SETS),
        cells=tuple(
            (method, "") for method in ("nf", "ebm", "ebm_langevin", "wgan", "jeffreys")
        ),
        training=Training(epochs=150, batch_size=450, learning_rate=3e-3),
        networks=Networks(),
        num_training=500,
    ),
    "tabular": Study(
        datasets=tuple(TABLES),
        cells=tuple((method, "") for method in ("nf", "wgan", "jeffreys")),
        # A coupling flow: an autoregressive one needs a pass for every column to
        # draw samples.
        training=Training(epochs=120, batch_size=200, learning_rate=1e-3),
        networks=Networks(flow="nsf", energy_features=64),
    ),
}


def execute(run: Run, folder: Path) -> dict[str, Any]:
    """Fit one method and return its metrics and curve.

    `nll_best` is the test NLL at the epoch that validation samples choose, `nll_last`
    that at the last epoch; of ours `nll_proxy` and `nll_refined` are those of the proxy
    and of the refined density. `entropy` is the mean of -log π on the test samples
    where π is known, so that NLL - entropy is the KL divergence to the truth.
    """
    study = STUDIES[run.study]
    training, weights = configure(study.training, run.setting)
    entropy = None
    if run.dataset in SETS:
        density = planar_density(run.dataset)
        train = density.sample(study.num_training, seed=run.seed)
        test = density.sample(NUM_TEST, seed=10_000 + run.seed)
        if density.log_prob is not None:
            entropy = float(-density.log_prob(test).mean())
    else:
        train, test = split_table(run.dataset, run.seed)
    fitted = fit(run.method, train, test, training, study.networks, run.seed, weights)
    points = torch.as_tensor(test, dtype=torch.float32)
    nll = {name: mean_nll(d, points) for name, d in fitted.densities.items()}
    if run.study == "planar" and run.seed == MAP_SEED:
        _write_map(run, fitted.densities, folder)
    return {
        "nll_best": nll["main"],
        "nll_last": fitted.curve["nll"][-1],
        "nll_proxy": nll.get("proxy"),
        "nll_refined": nll.get("refined"),
        "entropy": entropy,
        "log_partition_last": fitted.curve["log_partition"][-1],
        "epochs": int(fitted.curve["epoch"][-1]),
        "seconds": round(fitted.seconds, 2),
        "curve": curve_text(fitted.curve),
    }


def configure(
    training: Training, setting: str
) -> tuple[Training, tuple[float, float, float] | None]:
    """Return training and weights of a setting.

    Raises:
        InputError: If the setting cannot be read.
    """
    if not setting:
        return training, None
    name, _, value = setting.partition("=")
    try:
        numbers = [float(number) for number in value.split(":")]
    except ValueError:
        numbers = []
    if name == "lr" and len(numbers) == 1:
        return Training(training.epochs, training.batch_size, numbers[0]), None
    if name == "weights" and len(numbers) == 3:
        return training, (numbers[0], numbers[1], numbers[2])
    raise InputError(
        f"a setting is lr=RATE or weights=A:B:C with numbers, got {setting!r}."
    )


def grid(extent: float, size: int = MAP_SIZE) -> np.ndarray:
    """Return points of a square grid, of shape `(size ** 2, 2)`, row by row."""
    axis = (np.arange(size) + 0.5) / size * 2 * extent - extent
    x, y = np.meshgrid(axis, axis)
    return np.stack((x.ravel(), y.ravel()), 1)


def map_path(folder: Path, dataset: str, method: str) -> Path:
    """Return the file of the density maps of a method."""
    return Path(folder) / "maps" / f"{dataset}_{method}.npz"


def _write_map(run: Run, densities: dict[str, Any], folder: Path) -> None:
    points = torch.as_tensor(
        grid(planar_density(run.dataset).extent), dtype=torch.float32
    )
    with torch.no_grad():
        maps = {
            name: log_prob(points).exp().reshape(MAP_SIZE, MAP_SIZE).half().numpy()
            for name, log_prob in densities.items()
        }
    file = io.BytesIO()
    np.savez_compressed(file, **maps)
    write_whole(map_path(folder, run.dataset, run.method), file.getvalue())


def planned_runs(studies: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of several studies, seed by seed.

    Raises:
        InputError: If there is no study of that name.
    """
    for name in studies:
        if name not in STUDIES:
            raise InputError(
                f"there is no study {name!r}; known: {', '.join(STUDIES)}."
            )
    return [
        run
        for seed in seeds
        for name in studies
        for run in STUDIES[name].runs(name, [seed])
    ]
