"""The density studies: data, baselines, metrics and tables against closed forms."""

import contextlib
import json
import math
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, multivariate_normal
from sklearn.datasets import load_diabetes

from tasks.__main__ import main
from tasks.density import report, studies
from tasks.density.baselines import (
    EnergyModel,
    NormalizingFlow,
    Training,
    WassersteinGAN,
)
from tasks.density.images import (
    ImageStudy,
    execute,
    frechet_distance,
    load_folder,
    precision_and_recall,
)
from tasks.density.methods import fit
from tasks.density.networks import Networks
from tasks.density.paper import JointJeffreys
from tasks.density.sets import SETS, planar_density
from tasks.density.studies import STUDIES, Study, configure, grid, planned_runs
from tasks.density.table import Run, read_table, run_all
from tasks.density.tables import split_table
from tasks.errors import InputError

SMALL = Networks(num_transforms=1, flow_features=8, energy_features=8, energy_blocks=1)
FEW = Training(epochs=2, batch_size=50, learning_rate=1e-3)
KNOWN = [name for name, density in SETS.items() if density.log_prob is not None]

# --------------------------------------------------------------------------------- data


def test_there_are_eight_sets_and_more_and_most_are_known():
    assert len(SETS) >= 8 and len(KNOWN) >= 7


@pytest.mark.parametrize("name", KNOWN)
def test_density_integrates_to_one_and_is_that_of_the_samples(name):
    density = planar_density(name)
    size, side = 240, 8
    points = grid(6.0, size)
    mass = np.exp(density.log_prob(points)) * (12.0 / size) ** 2
    assert mass.sum() == pytest.approx(1.0, abs=2e-3)
    # Samples against the density, in the cells of a coarse grid.
    cell = ((points + 6) // (12 / side)).astype(int)
    expected = np.bincount(cell[:, 0] * side + cell[:, 1], mass, side**2)
    samples = density.sample(20_000, seed=0)
    found = np.clip((samples + 6) // (12 / side), 0, side - 1).astype(int)
    counts = np.bincount(found[:, 0] * side + found[:, 1], minlength=side**2)
    many = expected * 20_000 > 5
    rest = 20_000 - counts[many].sum(), 20_000 * (1 - expected[many].sum())
    observed = np.append(counts[many], rest[0])
    wanted = np.append(20_000 * expected[many], max(rest[1], 1e-9))
    if wanted[-1] < 5:  # too few for the statistic
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-5


def test_samples_are_reproducible_and_unknown_names_are_told():
    density = planar_density("pinwheel")
    np.testing.assert_array_equal(density.sample(5, 1), density.sample(5, 1))
    assert not np.array_equal(density.sample(5, 1), density.sample(5, 2))
    with pytest.raises(InputError, match="no 2-D density 'moon'; known: gaussian"):
        planar_density("moon")
    with pytest.raises(InputError, match="no table 'boston'"):
        split_table("boston", 1)


def test_tables_are_split_and_standardised_by_their_training_rows():
    train, test = split_table("diabetes", 3)
    num = len(load_diabetes().data)  # type: ignore[attr-defined]
    assert train.shape[1] == test.shape[1] == 9  # without the sex
    assert len(train) + len(test) == num and len(test) == math.ceil(0.2 * num)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(train.std(0), 1)
    rows = {tuple(row) for row in train.round(9)}
    assert not rows & {tuple(row) for row in test.round(9)}
    assert not np.array_equal(train, split_table("diabetes", 4)[0])


# ---------------------------------------------------------------------------- baselines


def test_untrained_energy_is_its_gaussian():
    theta = torch.randn(400, 2) @ torch.tensor([[1.0, 0.4], [0.0, 0.5]])
    model = EnergyModel(SMALL, FEW)
    model.build(theta, torch.zeros(400, 1))
    model.train(False)
    truth = multivariate_normal(theta.mean(0).numpy(), np.cov(theta.numpy().T))
    with torch.no_grad():
        found = model.log_prob(theta[:20]).numpy()
    np.testing.assert_allclose(found, truth.logpdf(theta[:20].numpy()), atol=0.02)
    assert model.log_partition() == pytest.approx(0.0, abs=1e-5)


def test_langevin_chains_keep_a_distribution_that_they_have():
    model = EnergyModel(SMALL, Training(1, 4000, 1e-3), "langevin", num_steps=50)
    theta = 3 * torch.randn(4000, 2) + 1
    model.build(theta, torch.zeros(4000, 1))
    model._walk()
    # The discretisation error of the variance is a fourth of the squared step.
    assert (model.chains.std(0) / theta.std(0)).sub(1).abs().max() < 0.05
    assert (model.chains.mean(0) - theta.mean(0)).abs().max() < 5 * 3 / math.sqrt(4000)


def test_gradient_penalty_of_a_linear_critic():
    model = WassersteinGAN(SMALL, FEW, gradient_penalty=10.0)
    slope = torch.tensor([3.0, 4.0])
    model.critic = lambda theta, x: theta @ slope  # type: ignore[assignment]
    data, generated = torch.randn(50, 2), torch.randn(50, 2)
    loss = model._critic_loss(data, generated)
    expected = (generated - data).mean(0) @ slope + 10 * (5.0 - 1) ** 2
    torch.testing.assert_close(loss, expected)


def test_the_generator_goes_where_the_critic_sends_it():
    theta = torch.randn(200, 2)
    model = WassersteinGAN(SMALL, Training(1, 200, 1e-2), num_critic_steps=1)
    torch.manual_seed(0)
    model.build(theta, torch.zeros(200, 1))
    slope = torch.tensor([1.0, -2.0])
    model.critic = lambda theta, x: theta @ slope  # type: ignore[assignment]
    with torch.no_grad():
        before = (model.sample(2000) @ slope).mean()
    for _ in range(20):
        model.step(theta)
    with torch.no_grad():
        after = (model.sample(2000) @ slope).mean()
    # The standard error of a mean is 0.05.
    assert after > before + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["importance", "langevin"])
def test_an_energy_learns_what_its_base_measure_has_not(sampler):
    theta = torch.as_tensor(planar_density("eight_gaussians").sample(600, 0)).float()
    model = EnergyModel(Networks(), Training(60, 270, 1e-2), sampler)
    losses = []

    def on_epoch(epoch: int) -> None:
        if epoch >= 30 and epoch % 5 == 0:
            losses.append(-model.log_prob(model.validation).mean().item())

    torch.manual_seed(0)
    model.fit(theta, on_epoch)
    gaussian = multivariate_normal(theta.mean(0).numpy(), np.cov(theta.numpy().T))
    # The entropy is 1.9 nats below the Gaussian's; the best epoch is the one kept.
    assert min(losses) < -gaussian.logpdf(model.validation.numpy()).mean() - 0.3


def test_maximum_likelihood_lowers_the_validation_loss():
    theta = torch.as_tensor(planar_density("two_moons").sample(400, 0)).float()
    torch.manual_seed(0)
    training = Training(epochs=60, batch_size=400, learning_rate=5e-3)
    model = NormalizingFlow(Networks(), training)
    losses = []

    def on_epoch(epoch: int) -> None:
        losses.append(-model.log_prob(model.validation).mean().item())

    model.fit(theta, on_epoch)
    assert len(model.validation) == 40
    gaussian = multivariate_normal(theta.mean(0).numpy(), np.cov(theta.numpy().T))
    assert losses[-1] < -gaussian.logpdf(model.validation.numpy()).mean() - 0.2


def test_divergences_of_the_papers_algorithm():
    theta = torch.randn(500, 2) @ torch.tensor([[1.0, 0.4], [0.0, 0.5]])
    model = JointJeffreys(SMALL, FEW)
    torch.manual_seed(0)
    model.build(theta, torch.zeros(500, 1))
    model.train(False)
    forward, reverse, proxy_forward = model.divergences(theta)
    with torch.no_grad():
        torch.testing.assert_close(forward.detach(), -model.log_prob(theta))
        # The energy is zero: q is its Gaussian base measure.
        truth = multivariate_normal(theta.mean(0).numpy(), np.cov(theta.numpy().T))
        expected = -truth.logpdf(theta.numpy())
        np.testing.assert_allclose(proxy_forward.detach().numpy(), expected, atol=0.1)
        drawn = model.sample(20_000)
        log_ratio = model.log_prob(drawn).numpy() - truth.logpdf(drawn.numpy())
    error = 5 * log_ratio.std() / math.sqrt(2000)
    assert reverse.item() == pytest.approx(log_ratio.mean(), abs=error + 0.02)


def test_the_reverse_divergence_leads_the_flow_to_the_energy():
    theta = torch.randn(500, 2) @ torch.tensor([[1.0, 0.4], [0.0, 0.5]])
    weights = (0.0, 1.0, 0.0)
    torch.manual_seed(0)
    model = JointJeffreys(SMALL, Training(40, 500, 1e-2), weights)
    reverse = []
    model.fit(theta, lambda _: reverse.append(model.divergences(theta)[1].item()))
    assert reverse[-1] < 0.5 * reverse[0]


@pytest.mark.parametrize("method", ["nf", "ebm_langevin", "wgan", "dual", "jeffreys"])
def test_every_method_gives_densities_samples_and_a_curve(method):
    data = planar_density("eight_gaussians")
    training = Training(epochs=6, batch_size=60, learning_rate=1e-3)
    fitted = fit(
        method, data.sample(60, 0), data.sample(50, 1), training, SMALL, 0, every=3
    )
    # Three stages of ours are as long as the training of the others, each.
    last = 18 if method == "jeffreys" else 6
    assert fitted.curve["epoch"] == list(range(3, last + 1, 3))
    assert np.isfinite(fitted.curve["nll"]).all()
    assert np.isfinite(fitted.curve["log_partition"][-1]) == (
        method not in ("nf", "wgan")
    )
    assert fitted.sample(7).shape == (7, 2)
    points = torch.as_tensor(grid(9.0, 120), dtype=torch.float32)
    names = {"dual": 2, "jeffreys": 3}
    assert len(fitted.densities) == names.get(method, 1)
    for log_prob in fitted.densities.values():
        with torch.no_grad():
            total = log_prob(points).exp().sum().item() * (18 / 120) ** 2
        assert total == pytest.approx(1.0, abs=0.05)


def test_weights_belong_to_the_penalty_form():
    X = np.random.default_rng(0).standard_normal((20, 2))
    with pytest.raises(InputError, match="weights belong to the penalty form"):
        fit("nf", X, X, FEW, SMALL, 0, weights=(1, 1, 1))
    with pytest.raises(InputError, match="no method 'vae'"):
        fit("vae", X, X, FEW, SMALL, 0)


# ------------------------------------------------------------------------------ metrics


def with_moments(mean: list[float], scale: list[float], num: int = 200) -> np.ndarray:
    """Return points whose sample mean and standard deviations are exactly these."""
    points = np.random.default_rng(0).standard_normal((num, len(mean)))
    points -= points.mean(0)
    root = np.linalg.cholesky(np.cov(points.T))
    return points @ np.linalg.inv(root).T * scale + mean


def test_frechet_distance_of_gaussians():
    first = with_moments([0.0, 1.0, -2.0], [1.0, 2.0, 0.5])
    second = with_moments([1.0, 1.0, 0.0], [3.0, 2.0, 1.0], num=300)
    # Diagonal covariances: squared differences of means and standard deviations.
    expected = (1 + 0 + 4) + (4 + 0 + 0.25)
    assert frechet_distance(first, second) == pytest.approx(expected)
    assert frechet_distance(second, first) == pytest.approx(expected)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)
    # Rotations change nothing.
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(expected)


def test_precision_and_recall():
    rng = np.random.default_rng(0)
    left, right = rng.normal(-50, 1, (100, 2)), rng.normal(50, 1, (100, 2))
    both = np.concatenate((left, right))
    assert precision_and_recall(both, both) == (1.0, 1.0)
    assert precision_and_recall(left, right) == (0.0, 0.0)
    # One mode of two: all samples are good, half the images are missed.
    precision, recall = precision_and_recall(both, left)
    assert precision == 1.0 and recall == 0.5


def test_precision_and_recall_hold_distances_only():
    # Differences of all pairs in 64 features would take a gigabyte.
    points = np.random.default_rng(0).standard_normal((2, 1000, 64))
    tracemalloc.start()
    precision, recall = precision_and_recall(*points, num_neighbours=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e8
    # Balls of nearest neighbours, one by one.
    for found, (centers, others) in ((precision, points), (recall, points[::-1])):
        inside = np.zeros(1000, dtype=bool)
        for index, center in enumerate(centers):
            own = np.delete(np.linalg.norm(centers - center, axis=1), index).min()
            inside |= np.linalg.norm(others - center, axis=1) <= own
        assert found == inside.mean()


# ------------------------------------------------------------------------------- tables


def test_a_resumed_study_runs_only_what_is_missing(tmp_path):
    runs = [Run("s", "d", "m", setting, seed) for setting in "ab" for seed in (1, 2)]
    calls = []

    def execute_one(run, folder):
        calls.append(run)
        if run.setting == "b" and len(calls) < 5:
            raise ValueError("no good")
        return {"nll_best": run.seed / 2, "curve": "{}"}

    assert run_all(runs[:1], execute_one, tmp_path) == (1, 0, 0)
    assert run_all(runs, execute_one, tmp_path) == (3, 1, 2)
    assert calls == [runs[0], *runs[1:]]
    table = read_table(tmp_path)
    assert list(table["status"]) == ["ok", "ok", "failed", "failed"]
    assert "ValueError: no good" in table["error"].iloc[-1]
    assert list(table["nll_best"][:2]) == [0.5, 1.0]
    # Failed rows stay, and count, until they are asked for.
    assert run_all(runs, execute_one, tmp_path) == (0, 4, 2)
    assert run_all(runs[:2], execute_one, tmp_path) == (0, 2, 0)
    twice = [*runs, *runs]
    assert run_all(twice, execute_one, tmp_path, retry_failed=True) == (2, 2, 0)
    assert len(calls) == 6 and calls[4:] == runs[2:]
    assert (read_table(tmp_path)["status"] == "ok").all()


def test_names_that_look_like_numbers_are_names(tmp_path):
    runs = [Run("s", "007", "m", "1.50", 1)]
    for made in (1, 0):
        counts = run_all(runs, lambda *_: {"nll_best": 0.25}, tmp_path)
        assert counts == (made, 1 - made, 0)
    (row,) = read_table(tmp_path).to_dict("records")
    assert (row["dataset"], row["setting"], row["error"]) == ("007", "1.50", "")
    assert row["nll_best"] == 0.25 and math.isnan(row["nll_last"])


def test_ctrl_c_leaves_the_finished_rows(tmp_path):
    def execute_one(run, folder):
        if run.seed == 2:
            raise KeyboardInterrupt
        return {}

    runs = [Run("s", "d", "m", "", seed) for seed in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, execute_one, tmp_path)
    assert list(read_table(tmp_path)["seed"]) == [1]


def test_a_training_that_ctrl_c_cut_short_is_no_row(tmp_path):
    def execute_one(run, folder):
        # As JeffreysNPE, which takes Ctrl-C for the wish to end its training.
        if run.seed == 2:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return {"nll_best": 0.5}

    runs = [Run("s", "d", "m", "", seed) for seed in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, execute_one, tmp_path)
    assert list(read_table(tmp_path)["seed"]) == [1]


def test_settings():
    assert configure(FEW, "") == (FEW, None)
    assert configure(FEW, "lr=0.5")[0].learning_rate == 0.5
    assert configure(FEW, "weights=1:0.1:10")[1] == (1.0, 0.1, 10.0)
    for setting in ("lr=fast", "weights=1:2", "depth=3"):
        with pytest.raises(InputError, match="a setting is lr=RATE or weights=A:B:C"):
            configure(FEW, setting)


def test_the_studies_are_those_of_the_issue():
    settings = [s for m, s in STUDIES["dual_vs_penalty"].cells if m == "penalty"]
    assert len(set(settings)) == 25
    assert {"nf", "wgan", "jeffreys"} <= {m for m, _ in STUDIES["stability"].cells}
    assert len({s for _, s in STUDIES["stability"].cells}) == 2
    assert len(STUDIES["planar"].datasets) >= 8
    assert len(STUDIES["tabular"].datasets) >= 3
    runs = planned_runs(list(STUDIES), [1, 2])
    assert len(set(runs)) == len(runs)
    # Seed by seed, so that an interrupted sweep has all studies.
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    with pytest.raises(InputError, match="no study 'faces'"):
        planned_runs(["faces"], [1])


def test_command_line_makes_rows_and_report_and_resumes(tmp_path, monkeypatch, capsys):
    cells = (("nf", "lr=0.001"), ("wgan", "lr=0.001"), ("jeffreys", "lr=0.02"))
    stability = Study(
        ("gaussian_mixture",), cells, Training(12, 60, 1e-3), SMALL, num_training=60
    )
    monkeypatch.setattr(studies, "STUDIES", {"stability": stability})
    monkeypatch.setattr(report, "STUDIES", {"stability": stability})
    results, out = str(tmp_path / "results"), str(tmp_path / "docs")
    command = ["density", "--seeds", "1-2", "--results", results, "--report", out]
    assert main(command) == 0
    told = "6 rows added, 0 were there, 0 of them failed."
    assert told in capsys.readouterr().out
    assert main(command) == 0
    assert "0 rows added, 6 were there" in capsys.readouterr().out
    table = read_table(tmp_path / "results")
    assert len(table) == 6 and (table["status"] == "ok").all()
    assert json.loads(table["curve"].iloc[0])["epoch"] == [10]
    text = (tmp_path / "docs" / "stability_results.inc").read_text()
    assert "2 seeds" in text
    # What was not run at both rates, or on too few seeds, gets no verdict.
    assert "**WGAN fails at the high rate** (KL above 1 nat): not measured yet" in text
    assert "low rate" in text and "open, with fewer than 3 seeds" in text
    assert "holds" not in text.replace("does not hold", "holds")
    planar = (tmp_path / "docs" / "planar_results.inc").read_text()
    assert planar == "Not measured yet.\n"
    assert (tmp_path / "docs" / "figures" / "stability.png").stat().st_size > 1000
    assert main(["density", "--studies", "faces", "--results", results]) == 2


def test_failed_rows_of_an_earlier_call_are_told(tmp_path, monkeypatch, capsys):
    def no_fit(*arguments, **keywords):
        raise ValueError("no good")

    small = Study(("two_moons",), (("nf", ""),), FEW, SMALL, num_training=60)
    monkeypatch.setattr(studies, "STUDIES", {"small": small})
    monkeypatch.setattr(studies, "fit", no_fit)
    command = ["density", "--seeds", "1", "--results", str(tmp_path)]
    for told in ("1 rows added, 0 were there", "0 rows added, 1 were there"):
        assert main(command) == 1
        out = capsys.readouterr().out
        assert f"{told}, 1 of them failed." in out and "`--retry-failed`" in out


@pytest.mark.parametrize(
    "command", [["density", "--studies"], ["images", "--seeds", "1"]]
)
def test_threads_that_torch_cannot_have_are_said(command, tmp_path, capsys):
    results = tmp_path / "results"
    assert main([*command, "--threads", "0", "--results", str(results)]) == 2
    error = capsys.readouterr().err
    assert error == "error: --threads must be at least 1, got 0.\n"
    assert not results.exists()


@pytest.mark.parametrize("dual_nll, verdict", [(1.0, "holds"), (3.5, "does not hold")])
def test_verdicts_follow_from_the_rows(tmp_path, dual_nll, verdict):
    runs = planned_runs(list(STUDIES), [1, 2, 3])
    runs += ImageStudy().runs([1, 2, 3])
    # KL to the truth of NF rises by 0.5, that of all others does not.
    nll = {"nf": 3.0, "dual": dual_nll, "wgan": 9.0, "jeffreys": 2.5}

    def execute_one(run, folder):
        last = nll.get(run.method, 3.2) + 0.01 * run.seed
        start = last + 1.0
        lowest = last - 0.5 if run.method == "nf" else last
        curve = {
            "epoch": [10, 20, 30, 40],
            "nll": [start, lowest, lowest, last],
            "log_partition": [0.1, 0.1, 0.2, 0.1],
        }
        ours = (
            {"nll_proxy": 2.4, "nll_refined": 2.3} if run.method == "jeffreys" else {}
        )
        return ours | {
            "nll_best": lowest,
            "nll_last": last,
            "entropy": 2.0,
            "frechet": last,
            "mean_shift": 0.1,
            "precision": 0.5,
            "recall": 0.5,
            "epochs": 40,
            "seconds": 1.0,
            "curve": json.dumps(curve),
        }

    run_all(runs, execute_one, tmp_path / "results")
    out = report.write_report(tmp_path / "results", tmp_path / "docs")
    text = {p.stem[:-8]: p.read_text() for p in out.glob("*_results.inc")}
    assert (
        f"At least as good as the best weighting:** {verdict}."
        in (text["dual_vs_penalty"])
    )
    assert "stays near one** (within a factor of two): holds" in text["dual_vs_penalty"]
    assert (
        "NF overfits, its KL rises** (by more than 0.05 nats): holds"
        in (text["stability"])
    )
    assert "WGAN fails at the high rate** (KL above 1 nat): holds" in text["stability"]
    assert text["stability"].count("rises by less than 0.05 nats): holds") == 2
    assert "at the last epoch: better on 9 of 9 sets" in text["planar"]
    # NF - ours at the chosen epoch: 2.5 - 2.5, and with the refined density 2.5 - 2.3.
    assert "wine" in text["tabular"] and "| 0.000 ± 0.000 |" in text["tabular"]
    assert "nearer to the test images than NF's:** holds" in text["images"]


# ------------------------------------------------------------------------------- images


@pytest.fixture
def folder(tmp_path):
    """A folder of small pictures in two classes."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 200)):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for index in range(14):
            pixels = (level + 20 * rng.standard_normal((10, 12))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "faces" / name / f"{index}.png")
    return tmp_path / "faces"


def test_a_folder_of_images_is_read(folder, tmp_path):
    images, labels = load_folder(folder, size=8)
    assert images.shape == (28, 8, 8) and 0 <= images.min() < images.max() <= 1
    assert list(labels) == [0] * 14 + [1] * 14
    assert images[:14].mean() == pytest.approx(60 / 255, abs=0.02)
    assert load_folder(folder / "dark", 8)[1] is None
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds 0 images"):
        load_folder(tmp_path / "none", 8)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([10], "holds 10 images .* at least 11 are needed"),
        ([11], None),
        ([12, 1], "13 images in .* are of 2 classes.* needs two images or more"),
        ([2] * 6, "12 images in .* are of 6 classes"),
        ([3] * 4, None),
    ],
)
def test_what_is_read_can_be_split_and_compared(tmp_path, classes, message):
    rng = np.random.default_rng(0)
    for label, num in enumerate(classes):
        (tmp_path / "faces" / str(label)).mkdir(parents=True)
        for index in range(num):
            pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"faces/{label}/{index}.png")
    study = ImageStudy(tmp_path / "faces", size=8, latent=2)
    run = study.runs([1])[0]
    if message is None:
        assert 0 <= execute(study, run, tmp_path / "results")["recall"] <= 1
    else:
        with pytest.raises(InputError, match=message):
            execute(study, run, tmp_path / "results")


@pytest.mark.parametrize("relative", [".", "../faces", "0/.."])
def test_the_folder_of_images_names_the_data(tmp_path, monkeypatch, relative):
    (tmp_path / "faces" / "0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "faces")
    assert ImageStudy(Path(relative)).dataset == "faces"


def test_images_of_any_folder_in_any_latent_size(folder, tmp_path):
    study = ImageStudy(folder, size=8, latent=100, epochs=3)
    runs = {run.method: run for run in study.runs([1])}
    assert {"nf", "wgan", "jeffreys", "reconstructions"} <= set(runs)
    for method in ("reconstructions", "nf"):
        metrics = execute(study, runs[method], tmp_path / "results")
        assert metrics["frechet"] >= metrics["mean_shift"] >= 0
        assert 0 <= metrics["recall"] <= 1
    shown = np.load(next((tmp_path / "results" / "images").glob("*_nf_1.npy")))
    assert shown.shape == (9, 8, 8)


@pytest.mark.slow
def test_digits_survive_their_latent_space(tmp_path):
    study = ImageStudy(epochs=6)
    runs = {run.method: run for run in study.runs([1])}
    floor, rough, flow = (
        execute(study, runs[method], tmp_path)
        for method in ("training images", "reconstructions", "nf")
    )
    # Real images are nearest to real ones, then reconstructions, then samples.
    assert floor["frechet"] < flow["frechet"]
    assert rough["frechet"] < flow["frechet"]
    assert rough["precision"] > 0.8 and rough["recall"] > 0.8
