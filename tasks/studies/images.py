r"""What a shared embedding network leaves to gain: the images of tutorial 5.

    python -m tasks.studies.images --out images.csv --seeds 1 2 3 4 5
    python -m tasks.studies.images --out images.csv --report

Stars on a noisy camera of 12 x 12 pixels, 1,000 images, networks and settings as in the
tutorial. NPE and `JeffreysNPE` are trained on the same images and judged by the density
that they give to the parameters of 1,000 others, in nats, as in
`tasks.studies.ablation`. Every seed has images of its own.
"""

import argparse
import math
import sys
from typing import Any

import pandas as pd
import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import CNNEmbedding
from sbi.utils import BoxUniform
from torch import Tensor

from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn
from tasks.report import markdown_table
from tasks.results import Row
from tasks.studies.ablation import held_out_losses
from tasks.studies.rows import run_study

SIZE, NOISE, BLUR = 12, 0.5, 1.3
NUM_IMAGES = 1_000
# Column, row and brightness of the star.
PRIOR = BoxUniform(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([11.0, 11.0, 5.0]))
MODELS = ("npe", "flow", "refined")


def simulator(theta: Tensor) -> Tensor:
    """Return images of stars, of shape `(num, SIZE, SIZE)`."""
    column, row, brightness = theta.T.reshape(3, -1, 1, 1)
    pixels = torch.arange(SIZE, dtype=theta.dtype)
    squares = (pixels - column).square() + (pixels.unsqueeze(1) - row).square()
    image = brightness * torch.exp(-squares / (2 * BLUR**2))
    return image + NOISE * torch.randn_like(image)


def train(kind: str, theta: Tensor, x: Tensor) -> Any:
    """Return what `train` returns, of `"npe"` or `"jeffreys"`."""
    embedding = CNNEmbedding(
        (SIZE, SIZE),
        out_channels_per_layer=[6, 8],
        kernel_size=3,
        num_linear_units=64,
        output_dim=16,
    )
    trainer: type[NPE] = NPE
    keywords: dict[str, Any] = {}
    if kind == "jeffreys":
        trainer = JeffreysNPE
        keywords = {"energy_estimator": energy_nn(embedding_net=embedding)}
    inference = trainer(
        PRIOR,
        posterior_nn("maf", embedding_net=embedding),
        tracker=NoTracker(),
        show_progress_bars=False,
        **keywords,
    )
    inference.append_simulations(theta, x)
    return inference.train(stop_after_epochs=10, learning_rate=1e-3)


def run(seed: int) -> list[dict[str, Any]]:
    """Train both on the same images, and return a row for each model."""
    torch.manual_seed(9000 + seed)
    theta = PRIOR.sample((2 * NUM_IMAGES,))
    x = simulator(theta)
    losses = {}
    for kind in ("npe", "jeffreys"):
        torch.manual_seed(seed)
        estimator = train(kind, theta[:NUM_IMAGES], x[:NUM_IMAGES])
        of_kind = held_out_losses(estimator, PRIOR, theta[NUM_IMAGES:], x[NUM_IMAGES:])
        losses.update({"npe": of_kind["flow"]} if kind == "npe" else of_kind)
    gains = {model: losses["npe"] - losses[model] for model in MODELS}
    return [
        {
            "seed": seed,
            "model": model,
            "loss": losses[model].mean().item(),
            "gain": gains[model].mean().item(),
            "standard_error": gains[model].std().item() / math.sqrt(NUM_IMAGES),
        }
        for model in MODELS
    ]


def report(rows: pd.DataFrame) -> str:
    """Return a Markdown table of the losses, and of the gains over NPE."""
    table = rows.pivot_table(index="seed", columns="model", values=["loss", "gain"])
    lines = [
        [str(seed)]
        + [f"{row['loss', model]:.2f}" for model in MODELS]
        + [f"{row['gain', model]:.2f}" for model in MODELS[1:]]
        for seed, row in table.iterrows()
    ]
    means = [f"{table['loss', model].mean():.2f}" for model in MODELS]
    means += [
        f"{table['gain', m].mean():.2f} ± {table['gain', m].std():.2f}"
        for m in MODELS[1:]
    ]
    header = ["seed", "NPE", "flow", "refined", "gain of the flow", "gain of refined"]
    return markdown_table(header, [*lines, ["mean ± sd of seeds", *means]])


def main() -> int:
    """Run what is not in the file yet, or report what is.

    Returns:
        The exit status: 0; 2 for wrong input; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        description="NPE and JeffreysNPE with a shared embedding network."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])

    def keys(options: argparse.Namespace) -> list[Row]:
        return [{"seed": seed} for seed in options.seeds]

    return run_study(parser, keys, run, report)


if __name__ == "__main__":
    sys.exit(main())
