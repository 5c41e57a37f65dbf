"""Images through the latent space of an autoencoder.

The autoencoder is fitted to the training images, a density model to their latents, and
its samples are decoded. They are compared with test images in the features of a
classifier: by the Fréchet distance and by precision and recall. What the autoencoder
costs is told by its reconstructions of the test images, and what few images cost by
the training images themselves.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.density.baselines import Training
from tasks.density.methods import curve_text, fit, mean_nll
from tasks.density.networks import Networks
from tasks.density.table import Run
from tasks.errors import InputError
from tasks.results import write_whole

STUDY = "images"
METHODS = ("nf", "wgan", "jeffreys")
REFERENCES = ("reconstructions", "training images")
TEST_FRACTION = 0.3
NEIGHBOURS = 3
NUM_SHOWN = 64
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageStudy:
    """Which images, and how they are modelled.

    Attributes:
        folder: Folder of images, None for scikit-learn's digits.
        size: Height and width that a folder's images are brought to.
        latent: Dimensions of the latent space.
        epochs: Epochs of the density models; ours takes as many for each of its stages.

    Raises:
        InputError: If one of the numbers is below 1.
    """

    folder: Path | None = None
    size: int = 32
    latent: int = 16
    epochs: int = 90

    def __post_init__(self) -> None:
        for name in ("size", "latent", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )

    @property
    def dataset(self) -> str:
        """Name of the data in the result table."""
        # `.` and `..` have no names.
        return "digits" if self.folder is None else self.folder.resolve().name

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """Return the runs, seed by seed."""
        return [
            Run(STUDY, self.dataset, method, f"latent={self.latent}", seed)
            for seed in seeds
            for method in (*REFERENCES, *METHODS)
        ]


def load_folder(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a folder of images in grey.

    Args:
        folder: The folder. If its images lie in two or more subfolders, these are their
            classes.
        size: Height and width that they are brought to.

    Returns:
        Images in [0, 1] of shape `(num, size, size)`, and their classes if any.

    Raises:
        InputError: If there are too few images, of all or of a class.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    # A test image's radius is the distance to a neighbour among the others.
    num_test = math.ceil(TEST_FRACTION * len(paths))
    if num_test <= NEIGHBOURS:
        raise InputError(
            f"{folder} holds {len(paths)} images ({', '.join(SUFFIXES)}); at least "
            f"{int(NEIGHBOURS / TEST_FRACTION) + 1} are needed, and some hundred for a "
            "fit worth looking at."
        )
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            grey = image.convert("L").resize((size, size))
            pictures.append(np.asarray(grey, dtype=np.float32) / 255)
    names = [path.relative_to(folder).parts[0] for path in paths]
    classes, labels = np.unique(names, return_inverse=True)
    in_subfolders = all(len(p.relative_to(folder).parts) > 1 for p in paths)
    has_classes = in_subfolders and len(classes) > 1
    if has_classes and (np.bincount(labels).min() < 2 or num_test < len(classes)):
        raise InputError(
            f"the {len(paths)} images in {folder} are of {len(classes)} classes, its "
            "subfolders. Every class needs two images or more, for training and test. "
            "Put images without classes into the folder itself."
        )
    return np.stack(pictures), labels if has_classes else None


class Autoencoder(nn.Module):
    """A small autoencoder of two hidden layers each way.

    Args:
        num_pixels: Number of pixels.
        latent: Dimensions of the latent space.
        hidden: Width.
    """

    def __init__(self, num_pixels: int, latent: int, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *_layers(num_pixels, hidden), *_layers(hidden, hidden // 2)
        ).append(nn.Linear(hidden // 2, latent))
        self.decoder = nn.Sequential(
            *_layers(latent, hidden // 2), *_layers(hidden // 2, hidden)
        ).append(nn.Linear(hidden, num_pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [0, 1] of shape `(num, num_pixels)`."""
        return self.decoder(latents).sigmoid()

    def fit(self, images: Tensor, epochs: int = 80) -> "Autoencoder":
        """Fit to images of shape `(num, num_pixels)` by binary cross-entropy.

        Noise on the latents keeps neighbours alike, so that what lies between the
        latents of the training images decodes to something.
        """

        def loss(batch: Tensor, _: Tensor) -> Tensor:
            latents = self.encoder(batch)
            noise = 0.1 * latents.detach().std(0) * torch.randn_like(latents)
            # A weak pull to the origin keeps the scale of the latents.
            reconstruction = F.binary_cross_entropy_with_logits(
                self.decoder(latents + noise), batch
            )
            return reconstruction + 1e-4 * latents.square().mean()

        _train(self, images, torch.zeros(len(images)), loss, epochs)
        return self


class Classifier(nn.Module):
    """A small classifier, whose last hidden layer gives the features.

    Args:
        num_pixels: Number of pixels.
        num_classes: Number of classes.
        num_features: Number of features.
    """

    def __init__(
        self, num_pixels: int, num_classes: int, num_features: int = 32
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_layers(num_pixels, 128), *_layers(128, num_features)
        )
        self.head = nn.Linear(num_features, num_classes)

    def fit(self, images: Tensor, labels: Tensor, epochs: int = 40) -> "Classifier":
        """Fit to labelled images."""

        def loss(batch: Tensor, classes: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.features(batch)), classes)

        _train(self, images, labels, loss, epochs)
        return self


def _layers(num_inputs: int, num_outputs: int) -> list[nn.Module]:
    return [nn.Linear(num_inputs, num_outputs), nn.SiLU()]


def _train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    batch_size: int = 100,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            loss(images[index], labels[index]).backward()
            optimizer.step()
    model.eval()


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    r"""Return the Fréchet distance of Gaussians fitted to two sets of features.

    .. math:: \lVert m_1 - m_2 \rVert^2 + \mathrm{tr}(C_1 + C_2 -
        2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})

    after M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a
    Local Nash Equilibrium", NeurIPS 2017, who take Inception's features.

    Args:
        first: Features of shape `(num, dim)`.
        second: Features of shape `(num, dim)`; the number may be another.
    """
    difference = first.mean(0) - second.mean(0)
    covariances = [
        np.atleast_2d(np.cov(part, rowvar=False)) for part in (first, second)
    ]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    trace = sum(np.trace(c) for c in covariances) - 2 * np.sqrt(product.clip(0)).sum()
    return float(difference @ difference + trace)


def precision_and_recall(
    real: np.ndarray, generated: np.ndarray, num_neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Return the share of samples near real images, and of images near samples.

    Near is nearer to some point of the other set than that point's `num_neighbours`-th
    neighbour, after T. Kynkäänniemi et al., "Improved Precision and Recall Metric for
    Assessing Generative Models", NeurIPS 2019.

    Args:
        real: Features of real images, of shape `(num, dim)`.
        generated: Features of samples, of shape `(num, dim)`.
        num_neighbours: Number of neighbours, not counting the point itself.
    """

    def covered(points: np.ndarray, by: np.ndarray) -> float:
        neighbours = NearestNeighbors(n_neighbors=num_neighbours + 1).fit(by)
        radii = neighbours.kneighbors(by)[0][:, -1]
        return float((cdist(points, by) <= radii).any(1).mean())

    return covered(generated, by=real), covered(real, by=generated)


@dataclass
class _Prepared:
    """Images, their autoencoder and their features, all of one seed."""

    autoencoder: Autoencoder
    features: Callable[[Tensor], np.ndarray]
    train: Tensor
    test: Tensor
    mean: Tensor
    scale: Tensor
    shape: tuple[int, int]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return latents of mean zero and standard deviation one."""
        return (self.autoencoder.encoder(images) - self.mean) / self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of standardised latents."""
        return self.autoencoder.decode(latents * self.scale + self.mean)


@lru_cache(maxsize=1)
def _prepare(study: ImageStudy, seed: int) -> _Prepared:
    """Split the images and fit autoencoder and classifier."""
    if study.folder is None:
        rows, labels = load_digits(return_X_y=True)
        images = rows.reshape(-1, 8, 8) / 16
    else:
        images, labels = load_folder(study.folder, study.size)
    pixels = torch.as_tensor(images, dtype=torch.float32).flatten(1)
    train, test = train_test_split(
        np.arange(len(pixels)),
        test_size=TEST_FRACTION,
        random_state=seed,
        stratify=labels,
    )
    torch.manual_seed(seed)
    autoencoder = Autoencoder(pixels.shape[1], study.latent).fit(pixels[train])
    network: nn.Module = autoencoder.encoder
    if labels is not None:
        classes = torch.as_tensor(labels)
        classifier = Classifier(pixels.shape[1], int(classes.max()) + 1)
        network = classifier.fit(pixels[train], classes[train]).features

    @torch.no_grad()
    def features(part: Tensor) -> np.ndarray:
        return network(part).numpy().astype(np.float64)

    with torch.no_grad():
        latents = autoencoder.encoder(pixels[train])
    height, width = images.shape[1:]
    return _Prepared(
        autoencoder,
        features,
        pixels[train],
        pixels[test],
        latents.mean(0),
        latents.std(0),
        (height, width),
    )


def execute(study: ImageStudy, run: Run, folder: Path) -> dict[str, Any]:
    """Fit one density model to the latents and compare its images with test images.

    Without classes the features are those of the encoder.
    """
    data = _prepare(study, run.seed)
    metrics: dict[str, Any] = {}
    if run.method == "reconstructions":
        images = data.decode(data.encode(data.test))
    elif run.method == "training images":
        images = data.train[: len(data.test)]
    else:
        latents, test = data.encode(data.train), data.encode(data.test)
        # A coupling flow: its samples need one pass in any dimension.
        networks = Networks("nsf", energy_features=64)
        training = Training(study.epochs, batch_size=400, learning_rate=1e-3)
        fitted = fit(
            run.method, latents.numpy(), test.numpy(), training, networks, run.seed
        )
        torch.manual_seed(run.seed)
        with torch.no_grad():
            images = data.decode(fitted.sample(len(data.test)))
        metrics = {
            "nll_best": mean_nll(fitted.densities["main"], test),
            "nll_last": fitted.curve["nll"][-1],
            "epochs": int(fitted.curve["epoch"][-1]),
            "seconds": round(fitted.seconds, 2),
            "curve": curve_text(fitted.curve),
        }
        for name in ("proxy", "refined"):
            if name in fitted.densities:
                metrics[f"nll_{name}"] = mean_nll(fitted.densities[name], test)
    real, generated = data.features(data.test), data.features(images)
    precision, recall = precision_and_recall(real, generated)
    shown = {run.method: images, "test": data.test}
    for name, part in shown.items():
        _write_images(folder, run, name, part[:NUM_SHOWN].reshape(-1, *data.shape))
    return metrics | {
        "frechet": frechet_distance(real, generated),
        # The first part of it: of the mean, which the shares of the classes decide.
        "mean_shift": float(((real.mean(0) - generated.mean(0)) ** 2).sum()),
        "precision": precision,
        "recall": recall,
    }


def images_path(folder: Path, dataset: str, setting: str, name: str, seed: int) -> Path:
    """Return the file of some images of a run."""
    stem = f"{dataset}_{setting}_{name}_{seed}".replace(" ", "-")
    return Path(folder) / "images" / f"{stem}.npy"


def _write_images(folder: Path, run: Run, name: str, images: Tensor) -> None:
    file = io.BytesIO()
    np.save(file, (255 * images).round().numpy().astype(np.uint8))
    path = images_path(folder, run.dataset, run.setting, name, run.seed)
    write_whole(path, file.getvalue())
