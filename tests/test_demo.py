"""The demonstration runs, online and offline, and its plots show what they should."""

import contextlib
import signal

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.path import Path
from sbi.inference import NPE

from sbi_jeffreys import JeffreysNPE, NoTracker, energy_nn
from sbi_jeffreys.plots import plot_training
from tasks import demo
from tasks.reference import ReferenceDataError
from tasks.two_moons import TwoMoons


@pytest.fixture
def short_demo(monkeypatch):
    """Few simulations, samples and epochs: what is printed and saved stays."""

    def shorten(trainer):
        class Short(trainer):
            def train(self, **kwargs):
                return super().train(max_num_epochs=3, **kwargs)

        return Short

    monkeypatch.setattr(demo, "NUM_SIMULATIONS", 200)
    monkeypatch.setattr(demo, "NUM_SAMPLES", 300)
    monkeypatch.setattr(demo, "NPE", shorten(NPE))
    monkeypatch.setattr(demo, "JeffreysNPE", shorten(JeffreysNPE))


def _refuse(self, n):
    raise ReferenceDataError("offline: put sbibm-1.1.0 there")


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_offline_the_demo_says_so_and_takes_the_closed_form(
    short_demo, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(TwoMoons, "reference_posterior_samples", _refuse)
    demo.main(tmp_path / "plots")
    printed = capsys.readouterr().out
    assert "offline: put sbibm-1.1.0 there" in printed
    assert "the task's closed form" in printed
    for name in ("NPE", "JeffreysNPE", "refined"):
        assert f"{name}" in printed
    assert printed.count("C2ST 0.") + printed.count("C2ST 1.") == 3
    for name in ("posterior.png", "training.png"):
        image = plt.imread(tmp_path / "plots" / name)
        assert image.shape[0] > 100
        assert image.std() > 0.01  # not blank


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_ctrl_c_ends_the_demo(short_demo, monkeypatch, tmp_path):
    monkeypatch.setattr(TwoMoons, "reference_posterior_samples", _refuse)

    class Interrupted(demo.JeffreysNPE):
        def train(self, **kwargs):
            # As a training that Ctrl-C ends.
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return super().train(**kwargs)

    monkeypatch.setattr(demo, "NPE", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main(tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_the_line_bounds_the_exact_posterior_and_every_posterior_has_its_panels():
    task = TwoMoons()
    x_o = torch.tensor([[-0.6, 0.1]])
    exact = task.reference_posterior(x_o)
    reference = exact.sample((3000,))
    samples = {"a": exact.sample((2000,)), "b": 0.9 * exact.sample((2000,))}
    figure = demo._crescents(task, x_o, reference, samples)
    upper, lower = figure.axes[:2], figure.axes[2:]
    assert [ax.get_title() for ax in upper] == ["a", "b"] and len(lower) == 2
    inside = {}
    for name, ax in zip(samples, upper, strict=True):
        dots, line = ax.collections
        np.testing.assert_allclose(dots.get_offsets(), samples[name], atol=1e-6)
        (path,) = line.get_paths()
        pieces = path.to_polygons()
        assert len(pieces) == 2  # one around each crescent
        found = sum(Path(piece).contains_points(samples[name]) for piece in pieces)
        inside[name] = found.mean()
    # 0.95 up to the error of 2,000 samples, of the quantile's and of the grid.
    assert inside["a"] == pytest.approx(0.95, abs=0.02) and inside["b"] < 0.5
    # Below is a whole crescent.
    (low, high), (bottom, top) = lower[0].get_xlim(), lower[0].get_ylim()
    one = reference[reference.sum(1) > 0]
    assert (one[:, 0] > low).all() and (one[:, 0] < high).all()
    assert (one[:, 1] > bottom).all() and (one[:, 1] < top).all()
    assert (high - low) * (top - bottom) < 0.5
    plt.close(figure)


def test_plot_training_draws_the_summary():
    torch.manual_seed(0)
    task = TwoMoons()
    theta = task.prior.sample((150,))
    inference = JeffreysNPE(
        task.prior,
        "maf",
        tracker=NoTracker(),
        show_progress_bars=False,
        energy_estimator=energy_nn(likelihood="auto"),
    )
    with pytest.warns(UserWarning, match="Maximum number of epochs"):
        inference.append_simulations(theta, task.simulator(theta)).train(
            max_num_epochs=6
        )
    # An epoch of every stage: where a model did not learn there is NaN, and a gap.
    stages = ["flow"] * 2 + ["likelihood"] * 2 + ["proxy"] * 2 + ["distillation"]
    assert inference.summary["stage"] == stages
    figure, axes = plot_training(inference.summary, fig_kwargs={"figsize": (9, 2)})
    lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    drawn = lines["proxy, $D_3$"].get_ydata()
    expected = inference.summary["validation_proxy_forward_kl"]
    np.testing.assert_array_equal(drawn, expected)
    assert np.isfinite(drawn).tolist() == [False] * 4 + [True] * 3
    assert (
        list(lines[r"$\lambda_2$"].get_ydata())
        == (inference.summary["dual_reverse_kl"])
    )
    assert len(drawn) == sum(inference.summary["epochs_trained"])
    # Told apart without colours.
    duals = [lines[rf"$\lambda_{i}$"].get_linestyle() for i in (1, 2, 3)]
    assert len({*duals, lines[r"trust $\tau$"].get_linestyle()}) == 4
    assert lines["proxy, $D_3$"].get_marker() != lines["flow, $D_1$"].get_marker()
    for ax in axes:
        vertical = [
            x[0] for x in (line.get_xdata() for line in ax.get_lines()) if len(x) == 2
        ]
        assert vertical == [2.5, 4.5, 6.5]  # where the stages change
    names = [text.get_text() for text in axes[0].texts]
    assert names == ["flow", "likelihood", "proxy", "distillation"]
    plt.close(figure)


def test_plot_training_wants_a_trained_inference():
    untrained = JeffreysNPE(tracker=NoTracker())
    with pytest.raises(ValueError, match="holds no epoch of JeffreysNPE"):
        plot_training(untrained.summary)
    with pytest.raises(ValueError, match="holds no epoch of JeffreysNPE"):
        plot_training(NPE(tracker=NoTracker()).summary)
