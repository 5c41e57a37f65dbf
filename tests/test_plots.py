"""Plots: what is drawn is what closed forms say, and can be told apart in print."""

import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from sbi.inference import NPE
from sbi.inference.posteriors import DirectPosterior
from sbi.utils import BoxUniform
from scipy.stats import chi2, ecdf, kstest
from torch.distributions import MultivariateNormal

from sbi_jeffreys import JeffreysEstimator, NoTracker, RefinedPosterior
from sbi_jeffreys.plots import (
    plot_c2st,
    plot_calibration,
    plot_corner,
    plot_densities,
    plot_training,
)
from tests.helpers import (
    LinearGaussianFlow,
    QuadraticEnergy,
    gaussian_proxy,
    gaussian_proxy_posterior,
)

X_O = torch.tensor([[0.4]])
# Okabe and Ito, "Color Universal Design", 2008.
OKABE_ITO = {
    *("#000000", "#e69f00", "#56b4e9", "#009e73"),
    *("#f0e442", "#0072b2", "#d55e00", "#cc79a7"),
}


KLS = ("forward_kl", "reverse_kl", "proxy_forward_kl")


def layout_engine(name):
    return plt.figure(layout=name).get_layout_engine()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def prior():
    return MultivariateNormal(torch.zeros(3), 9 * torch.eye(3))


@pytest.fixture
def flow():
    root = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.4, 0.1, 0.7]])
    weight = torch.tensor([[1.0], [-0.5], [0.2]])
    return LinearGaussianFlow(weight, torch.tensor([0.1, 0.0, -0.2]), root)


@pytest.fixture
def energy():
    root = torch.tensor([[1.5, 0.0, 0.0], [0.4, 1.8, 0.0], [0.2, -0.3, 1.2]])
    weight = torch.tensor([[0.7], [-0.2], [0.1]])
    return QuadraticEnergy(weight, torch.tensor([0.0, 0.3, 0.1]), root)


@pytest.fixture
def estimator(flow, energy, prior):
    return JeffreysEstimator(flow, gaussian_proxy(energy, prior))


def summary_of(num_epochs):
    """Return what `plot_training` reads of a summary, a value for every epoch."""
    names = [f"{part}_{name}" for part in ("training", "validation") for name in KLS]
    names += [f"dual_{name}" for name in KLS]
    names += ["trust", "log_partition", "effective_sample_size"]
    return {name: list(range(num_epochs)) for name in names}


def test_every_axis_of_a_training_has_a_label():
    fig, axes = plot_training(summary_of(5))
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in axes)


def test_keywords_of_the_figure_are_added_to_those_of_a_training():
    fig, _ = plot_training(summary_of(5), fig_kwargs={"layout": "tight"})
    assert type(fig.get_layout_engine()) is type(layout_engine("tight"))
    assert tuple(fig.get_size_inches()) == (13, 3.4)
    fig, _ = plot_training(summary_of(5), fig_kwargs={"dpi": 80})
    assert fig.dpi == 80
    assert tuple(fig.get_size_inches()) == (13, 3.4)
    assert type(fig.get_layout_engine()) is type(layout_engine("constrained"))


@pytest.mark.parametrize("top", [-2.4, -1.8])
def test_saved_pictures_of_a_training_are_whole(top, tmp_path):
    summary = {name: list(np.linspace(top, -3.9, 300)) for name in summary_of(1)}
    fig, axes = plot_training(summary)
    fig.savefig(tmp_path / "training.png", dpi=150)
    renderer = fig.canvas.get_renderer()
    assert all(ax.get_tightbbox(renderer).x0 > 0 for ax in axes)


STAGES = ("flow", "likelihood", "proxy", "distillation")


@pytest.mark.parametrize("figsize", [(13, 3.4), (9, 2), (10, 3)])
@pytest.mark.parametrize(
    "lengths",
    [(50, 40, 60, 45), (300, 2, 2, 2), (2, 2, 2, 300), (2, 300, 2, 2), (100, 30, 5)],
)
def test_names_of_stages_are_beside_each_other(lengths, figsize, tmp_path):
    names = [name for name, num in zip(STAGES, lengths, strict=False) if num]
    stages = [
        name for name, num in zip(STAGES, lengths, strict=False) for _ in range(num)
    ]
    summary = {**summary_of(len(stages)), "stage": stages}
    fig, (ax, *others) = plot_training(summary, fig_kwargs={"figsize": figsize})
    fig.savefig(tmp_path / "training.png", dpi=150)  # makes the layout again
    fig.canvas.draw()
    assert [text.get_text() for text in ax.texts] == names
    boxes = [text.get_window_extent() for text in ax.texts]
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0
    # Of its axes alone; a layout may move their ends by a few pixels.
    axes, following = ax.get_window_extent(), others[0].get_window_extent()
    assert axes.x0 - 6 < boxes[0].x0 and boxes[-1].x1 < following.x0 - 6
    assert all(text.get_fontsize() >= 5 for text in ax.texts)
    assert all(box.y0 > axes.y1 for box in boxes)
    assert all(box.y1 < ax.title.get_window_extent().y0 for box in boxes)


def test_names_of_stages_are_over_them_where_there_is_room():
    stages = [name for name in STAGES for _ in range(50)]
    _, axes = plot_training({**summary_of(200), "stage": stages})
    places = [text.get_position()[0] for text in axes[0].texts]
    # The last two would come next to each other: they may move by a few epochs.
    np.testing.assert_allclose(places, [25.5, 75.5, 125.5, 175.5], atol=12)
    np.testing.assert_allclose(places[:2], [25.5, 75.5], atol=1e-6)


def test_keywords_of_lines_take_the_place_of_those_of_a_training():
    def lines_of(axes):
        drawn = (line for ax in axes[0].figure.axes for line in ax.lines)
        return [line for line in drawn if len(line.get_xdata()) == 5]

    _, plain = plot_training(summary_of(5))
    _, axes = plot_training(summary_of(5), plot_kwargs={"lw": 3, "alpha": 0.5})
    for before, after in zip(lines_of(plain), lines_of(axes), strict=True):
        assert after.get_linewidth() == 3 and after.get_alpha() == 0.5
        assert after.get_color() == before.get_color()
        assert after.get_linestyle() == before.get_linestyle()


def test_keywords_of_the_figure_are_added_to_those_of_densities(estimator, prior):
    posterior = RefinedPosterior(estimator, prior)
    options = {"limits": [[-3.0, 3.0]] * 3, "condition": torch.zeros(3)}
    fig, axes = plot_densities(
        posterior,
        X_O,
        resolution=10,
        fig_kwargs={"dpi": 80, "sharey": False},
        **options,
    )
    assert fig.dpi == 80 and tuple(fig.get_size_inches()) == (8, 3.8)
    axes[0].set(xlim=(0, 1), ylim=(0, 1))
    assert axes[1].get_xlim() == (0, 1)  # shared as before
    assert axes[1].get_ylim() != (0, 1)


def shades(ax):
    return np.asarray(ax.collections[0].get_array())


def conditional(p: MultivariateNormal, dims, given) -> MultivariateNormal:
    """Return the density of two parameters given the third, by linear algebra."""
    (rest,) = set(range(3)) - set(dims)
    mean, cov = p.mean.squeeze(), p.covariance_matrix.squeeze()
    gain = cov[list(dims), rest] / cov[rest, rest]
    inner = cov[list(dims)][:, list(dims)]
    return MultivariateNormal(
        mean[list(dims)] + gain * (given[rest] - mean[rest]),
        inner - torch.outer(gain, cov[rest, list(dims)]),
    )


def direct(estimator, prior):
    return DirectPosterior(estimator, prior)


@pytest.mark.parametrize("make_posterior", [direct, RefinedPosterior])
def test_plot_densities_draws_both_conditionals(
    estimator, flow, energy, prior, make_posterior
):
    limits = [[-3.0, 4.0], [-9.0, 9.0], [-4.0, 3.0]]
    given = torch.tensor([99.0, 0.7, 99.0])  # only that of the second is used
    fig, axes = plot_densities(
        make_posterior(estimator, prior),
        X_O,
        limits=limits,
        dims=(0, 2),
        condition=given,
        points=torch.tensor([1.0, 2.0, 3.0]),
        labels=["a", "b", "c"],
        resolution=40,
        fig_kwargs={"figsize": (6, 3), "dpi": 80},
    )
    truths = [
        flow.distribution(X_O),
        gaussian_proxy_posterior(energy, X_O, prior)[0],
    ]
    first, second = (torch.linspace(*limits[d], 40) for d in (0, 2))
    # Rows of an image are values of the second parameter.
    grid = torch.stack(torch.meshgrid(first, second, indexing="xy"), -1)
    for ax, truth in zip(axes, truths, strict=True):
        truth = conditional(truth, (0, 2), given)
        expected = truth.log_prob(grid).exp()
        expected = (expected / expected.sum()).detach().numpy()
        np.testing.assert_allclose(shades(ax).reshape(40, 40), expected, atol=1e-6)
        assert ax.get_xlabel() == "a"
        marked = ax.lines[0].get_xydata()
        np.testing.assert_allclose(marked, [[1.0, 3.0]])
    assert axes[0].get_ylabel() == "c"
    assert axes[0].collections[0].get_clim() == axes[1].collections[0].get_clim()
    assert tuple(fig.get_size_inches()) == (6, 3) and fig.dpi == 80


def test_the_lines_of_plot_densities_hold_their_masses(estimator, flow, prior):
    given = torch.zeros(3)
    _, axes = plot_densities(
        RefinedPosterior(estimator, prior),
        X_O,
        limits=[[-3.5, 4.5], [-4.0, 4.0], [-4.0, 4.0]],
        condition=given,
        levels=(0.5, 0.9),
        resolution=150,
    )
    truth = conditional(flow.distribution(X_O), (0, 1), given)
    contours = axes[0].collections[1]
    for mass, path in zip((0.9, 0.5), contours.get_paths(), strict=True):
        points = torch.as_tensor(path.vertices, dtype=torch.float32)
        # A Gaussian's smallest region of mass m is an ellipse of known radius.
        deviation = points - truth.mean
        precision = truth.precision_matrix
        squared = ((deviation @ precision) * deviation).sum(1).detach().numpy()
        np.testing.assert_allclose(squared, chi2.ppf(mass, 2), rtol=0.05)


def test_keywords_of_the_lines_of_plot_densities(estimator, prior):
    _, axes = plot_densities(
        RefinedPosterior(estimator, prior),
        X_O,
        limits=[[-3.5, 4.5], [-4.0, 4.0], [-4.0, 4.0]],
        condition=torch.zeros(3),
        resolution=50,
        contour_kwargs={"colors": "red", "linestyles": ["--", "-"]},
    )
    for ax in axes:
        contours = ax.collections[1]
        assert to_hex(contours.get_edgecolor()[0]) == "#ff0000"
        assert contours.get_linewidth()[0] == 0.8  # as without
        outer, inner = contours.get_linestyle()
        assert outer[1] is not None and inner[1] is None


def test_plot_densities_finds_its_limits(estimator, flow, prior):
    _, axes = plot_densities(DirectPosterior(estimator, prior), X_O, dims=(-1, 0))
    mean = flow.mean(X_O)[0].detach()
    std = flow.covariance().diag().sqrt().detach()
    for dim, limits in ((2, axes[0].get_xlim()), (0, axes[0].get_ylim())):
        assert mean[dim] - 5 * std[dim] < limits[0] < mean[dim] - 2 * std[dim]
        assert mean[dim] + 2 * std[dim] < limits[1] < mean[dim] + 5 * std[dim]
    assert axes[0].get_xlabel() == r"$\theta_{3}$"


def test_plot_densities_shows_points_and_the_whole_flow(estimator, flow, prior):
    mean = flow.mean(X_O)[0].detach()
    std = flow.covariance().diag().sqrt().detach()
    # A proxy that is far narrower than the flow, and resampled from it.
    with torch.no_grad():
        estimator.proxy.net.root *= 3.0
    posterior = RefinedPosterior(estimator, prior, 1.0)
    assert posterior.sample((1000,), x=X_O).std(0)[0] < 0.5 * std[0]
    point = mean - 9.0 * std
    _, axes = plot_densities(posterior, X_O, points=point.double().numpy())
    for dim, limits in ((0, axes[0].get_xlim()), (1, axes[0].get_ylim())):
        assert limits[0] < point[dim]
        assert mean[dim] + 2 * std[dim] < limits[1] < mean[dim] + 5 * std[dim]
    # Shades are drawn as far as the point.
    edges = axes[0].collections[0].get_coordinates()
    assert edges[..., 0].min() < point[0] and edges[..., 1].min() < point[1]


def test_plot_densities_takes_observations_as_posteriors_do(estimator, prior):
    posterior = RefinedPosterior(estimator, prior)
    _, axes = plot_densities(posterior, X_O.numpy(), [[-2.0, 2.0]] * 3)
    assert shades(axes[0]).sum() > 0


@pytest.mark.parametrize("condition", [np.zeros(3), [0, 0, 0], torch.zeros(1, 3)])
def test_plot_densities_takes_any_condition(estimator, prior, condition):
    limits = [[-2.0, 2.0]] * 3
    posterior = RefinedPosterior(estimator, prior)
    _, axes = plot_densities(posterior, X_O, limits, condition=condition)
    _, same = plot_densities(posterior, X_O, limits, condition=torch.zeros(3))
    assert np.array_equal(shades(axes[0]), shades(same[0]))


def test_plot_densities_says_what_it_needs(estimator, prior):
    posterior = RefinedPosterior(estimator, prior)
    for dims in ((0, 0), (0, -3), (0, 3), (-4, 0)):
        with pytest.raises(ValueError, match="Two different parameters of 3"):
            plot_densities(posterior, X_O, dims=dims)
    # Six numbers are two points of three parameters only if they are given so.
    for name, value in (("points", torch.zeros(3, 2)), ("condition", [0.0, 0.0])):
        with pytest.raises(ValueError, match=f"{name} must hold 3 parameters"):
            plot_densities(posterior, X_O, **{name: value})
    with pytest.raises(ValueError, match="One condition is needed, got 2"):
        plot_densities(posterior, X_O, condition=torch.zeros(2, 3))
    one = LinearGaussianFlow(torch.ones(1, 1), torch.zeros(1), torch.eye(1))
    net = QuadraticEnergy(torch.ones(1, 1), torch.zeros(1), torch.eye(1))
    line = MultivariateNormal(torch.zeros(1), torch.eye(1))
    single = JeffreysEstimator(one, gaussian_proxy(net, line))
    with pytest.raises(ValueError, match="single parameter .* plot_corner"):
        plot_densities(RefinedPosterior(single, line), X_O)
    bounded = RefinedPosterior(estimator, BoxUniform(-9 * torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match="no density within the limits"):
        plot_densities(bounded, X_O, limits=[[2.0, 3.0]] * 3)
    theta = prior.sample((50,))
    npe = NPE(prior, tracker=NoTracker(), show_progress_bars=False)
    npe.append_simulations(theta, theta[:, :1]).train(max_num_epochs=1)
    with pytest.raises(TypeError, match="JeffreysNPE.build_posterior"):
        plot_densities(npe.build_posterior(), X_O)


def test_plot_corner_draws_every_posterior():
    wide = torch.randn(1000, 3)
    narrow = 1.0 + 0.1 * torch.randn(800, 3)
    wide[0] = 1e3  # an outlier must not hide the rest
    fig, axes = plot_corner(
        {"wide": wide, "narrow": narrow.numpy()},
        points=torch.tensor([[1.0, 1.0, 1.0]]),
        labels=["a", "b", "c"],
        figsize=(5, 5),
        upper="scatter",
        upper_kwargs=[{"mpl_kwargs": {"s": 2}}] * 2,
    )
    assert axes.shape == (3, 3)
    for i in range(3):
        curves = axes[i, i].lines[:2]
        styles = {(to_hex(line.get_color()), line.get_linestyle()) for line in curves}
        assert len(styles) == 2 and len({style for _, style in styles}) == 2
        assert {color for color, _ in styles} <= OKABE_ITO
        # The peak of an estimated density of a Gaussian is near its mean.
        peaks = [line.get_xdata()[np.argmax(line.get_ydata())] for line in curves]
        assert abs(peaks[1] - 1.0) < 0.1 and abs(peaks[0]) < 0.6
        low, high = axes[i, i].get_xlim()
        assert -5 < low < -2 and 2 < high < 5
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        "wide",
        "narrow",
    ]
    assert tuple(fig.get_size_inches()) == (5, 5)


@pytest.mark.parametrize("num", [1, 2])
def test_plot_corner_names_parameters_as_other_plots_do(num):
    _, axes = plot_corner({"normal": torch.randn(200, num)})
    diagonal = axes.reshape(num, num).diagonal()
    expected = [rf"$\theta_{{{i + 1}}}$" for i in range(num)]
    assert [ax.get_xlabel() for ax in diagonal] == expected


def test_plot_corner_contours_hold_their_masses():
    samples = torch.randn(2000, 2)
    _, axes = plot_corner(
        {"normal": samples}, levels=(0.5,), limits=[[-4, 4], [-4, 4]], bins=80
    )
    (contour,) = axes[0, 1].collections
    radius = np.linalg.norm(np.concatenate([p.vertices for p in contour.get_paths()]))
    num = sum(len(p.vertices) for p in contour.get_paths())
    # The kernels widen the estimate by a few per cent.
    assert radius / num**0.5 == pytest.approx(chi2.ppf(0.5, 2) ** 0.5, rel=0.1)


def test_plot_corner_adds_keywords_to_its_styles():
    samples = {"a": torch.randn(300, 2), "b": torch.randn(300, 2)}
    _, axes = plot_corner(samples, limits=[[-4, 4]] * 2)
    styles = [(line.get_color(), line.get_linestyle()) for line in axes[0, 0].lines]
    # A narrow kernel follows the samples: its estimate goes up and down more often.
    narrow = {"bw_method": 0.02}
    _, rough = plot_corner(
        samples, limits=[[-4, 4]] * 2, diag_kwargs=narrow, upper_kwargs=narrow
    )
    for before, after in zip(axes[0, 0].lines, rough[0, 0].lines, strict=True):
        turns = [
            np.sum(np.diff(np.sign(np.diff(line.get_ydata()))) != 0)
            for line in (before, after)
        ]
        assert turns[1] > 3 * turns[0]
    assert styles == [
        (line.get_color(), line.get_linestyle()) for line in rough[0, 0].lines
    ]
    # Its contours are in many pieces.
    pieces = [
        sum(
            np.sum(path.codes == path.MOVETO)
            for path in part[0, 1].collections[0].get_paths()
        )
        for part in (axes, rough)
    ]
    assert pieces[1] > 3 * pieces[0]


def curve_styles(lines):
    return [(to_hex(line.get_color()), line.get_linestyle()) for line in lines]


@pytest.mark.parametrize("place", ["diag", "upper"])
def test_keywords_of_lines_leave_plot_corner_its_colours(place):
    samples = {"a": torch.randn(200, 2), "b": torch.randn(200, 2) + 1}
    widths = {"diag": {"linewidth": 3.0}, "upper": {"linewidths": 3.0}}[place]
    fig, axes = plot_corner(samples, **{f"{place}_kwargs": {"mpl_kwargs": widths}})
    legend = curve_styles(fig.legends[0].get_lines())
    assert len(set(legend)) == 2
    if place == "diag":
        lines = axes[0, 0].lines[:2]
        assert curve_styles(lines) == legend
        assert {line.get_linewidth() for line in lines} == {3.0}
    else:
        for contours, (color, _) in zip(axes[0, 1].collections, legend, strict=True):
            assert {to_hex(edge) for edge in contours.get_edgecolor()} == {color}
            assert set(contours.get_linewidths()) == {3.0}


@pytest.mark.parametrize("place", ["upper", "lower"])
@pytest.mark.parametrize("kind", ["scatter", "hist", "kde", "contour"])
def test_plot_corner_draws_all_that_pairplot_draws(place, kind):
    samples = {"a": torch.randn(200, 2), "b": torch.randn(200, 2) + 1}
    fig, axes = plot_corner(samples, **{place: kind})
    ax = axes[0, 1] if place == "upper" else axes[1, 0]
    if kind in ("hist", "kde"):
        assert len(ax.images) == 2
        return
    colors = [color for color, _ in curve_styles(fig.legends[0].get_lines())]
    for part, color in zip(ax.collections, colors, strict=True):
        drawn = part.get_facecolor() if kind == "scatter" else part.get_edgecolor()
        assert {to_hex(value) for value in drawn} == {color}


def test_plot_corner_shows_points_beyond_the_samples():
    samples = torch.randn(300, 2)
    for points in (torch.tensor([[9.0, -9.0]]), [np.array([[9.0, -9.0]]), samples[:1]]):
        _, axes = plot_corner({"a": samples}, points=points)
        assert -5 < axes[0, 0].get_xlim()[0] < 9.0 < axes[0, 0].get_xlim()[1]
        assert axes[1, 1].get_xlim()[0] < -9.0 and axes[1, 1].get_xlim()[1] < 5
    for limits in (None, [[-4, 4]] * 2):
        with pytest.raises(ValueError, match="points must hold 2 parameters"):
            plot_corner({"a": samples}, limits=limits, points=torch.zeros(1, 3))


def test_plot_corner_takes_samples_as_pairplot_does():
    samples = torch.randn(300, 2)
    _, expected = plot_corner({"a": samples[1:]})
    part = samples.clone()
    part[0, 1] = torch.nan
    _, axes = plot_corner({"a": part})
    assert np.array_equal(
        axes[0, 0].lines[0].get_ydata(), expected[0, 0].lines[0].get_ydata()
    )
    # Far from zero single precision has no such differences.
    _, axes = plot_corner({"a": 1e9 + samples.double()}, points=[1e9 + samples[:1]])
    assert np.ptp(axes[0, 0].get_xlim()) < 20
    for other in (samples.half(), torch.randint(0, 9, (200, 2)), samples.double()):
        plot_corner({"a": other})
    for nothing in (samples[:0], torch.full((9, 2), torch.nan)):
        with pytest.raises(ValueError, match="No finite samples of b"):
            plot_corner({"a": samples, "b": nothing})


def test_plot_corner_refuses_other_parameters():
    with pytest.raises(ValueError, match="same parameters"):
        plot_corner({"a": torch.randn(10, 2), "b": torch.randn(10, 3)})
    with pytest.raises(ValueError, match="same parameters"):
        plot_corner({})


def in_band(ax, line):
    """Return whether a curve lies within the grey band of its axes."""
    outline = ax.collections[0].get_paths()[0].vertices
    middle = outline[np.isclose(outline[:, 0], 0.5)]
    width = middle[:, 1].max() - 0.5
    x, y = line.get_xdata(), line.get_ydata()
    inner = (x > 0) & (x < 1)
    return bool(np.all(np.abs(y - x)[inner] <= width + 1 / len(x)))


def test_plot_calibration_draws_ranks_and_coverage():
    num, L = 400, 1000
    good = torch.randint(0, L + 1, (num, 2))
    narrow = (torch.distributions.Beta(0.4, 0.4).sample((num, 2)) * L).round()
    alpha = torch.linspace(0, 1, 41)
    coverage = {"good": (alpha, alpha), "narrow": (alpha.sqrt(), alpha)}
    fig, axes = plot_calibration({"good": good, "narrow": narrow}, coverage, L)
    assert len(axes) == 3
    for i, ax in enumerate(axes[:2]):
        curves = {line.get_label(): line for line in ax.lines[1:]}
        expected = ecdf(good[:, i].numpy() / L).cdf
        x, y = curves["good"].get_data()
        at = np.linspace(0.01, 0.99, 50) + 1e-6
        np.testing.assert_allclose(
            y[np.searchsorted(x, at, side="right") - 1], expected.evaluate(at)
        )
        for name, ranks in (("good", good), ("narrow", narrow)):
            p_value = kstest(ranks[:, i].numpy() / L, "uniform").pvalue
            assert in_band(ax, curves[name]) == (p_value > 0.05), name
            assert (p_value > 0.05) == (name == "good")
    for line, name in zip(axes[2].lines[1:], coverage, strict=True):
        np.testing.assert_allclose(line.get_xdata(), alpha)
        np.testing.assert_allclose(line.get_ydata(), coverage[name][0])
    styles = [line.get_linestyle() for line in axes[2].lines[1:]]
    assert len(set(styles)) == 2
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == ["calibrated, 95 %", "good", "narrow"]


def test_plot_calibration_shows_ranks_that_are_never_reached():
    # Of a posterior far too wide, all ranks are in the middle. Bins between the
    # smallest and largest of them would show a diagonal.
    ranks = torch.randint(450, 551, (300, 1))
    _, axes = plot_calibration({"wide": ranks}, num_posterior_samples=1000)
    line = axes[0].lines[1]
    x, y = line.get_data()
    assert y[np.searchsorted(x, 0.4) - 1] == 0
    assert not in_band(axes[0], line)


def test_plot_calibration_of_coverage_alone():
    alpha = torch.linspace(0, 1, 11)
    _, axes = plot_calibration(coverage={"flow": (alpha, alpha)})
    assert len(axes) == 1 and not axes[0].collections  # no band without a number
    _, same = plot_calibration(coverage={"flow": (alpha.numpy(), alpha.numpy())})
    assert np.array_equal(same[0].lines[1].get_xydata(), axes[0].lines[1].get_xydata())
    _, axes = plot_calibration(coverage={"flow": (alpha, alpha)}, num_simulations=100)
    assert in_band(axes[0], axes[0].lines[1])


def test_plot_calibration_says_what_it_needs():
    with pytest.raises(ValueError, match="Nothing to plot"):
        plot_calibration()
    with pytest.raises(ValueError, match="the same for every posterior"):
        plot_calibration({"a": torch.ones(10, 2), "b": torch.ones(10, 3)})
    for wrong in (101, -1, torch.nan):
        ranks = torch.full((10, 1), wrong)
        with pytest.raises(ValueError, match="0 to num_posterior_samples=100; .* of a"):
            plot_calibration({"a": ranks}, num_posterior_samples=100)
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        plot_calibration({"a": torch.ones(9, 1)}, None, 100, confidence=95)
    # Of any number of samples ranks may be small.
    with pytest.raises(ValueError, match="need num_posterior_samples.*run_sbc was"):
        plot_calibration({"a": torch.ones(10, 1)})


def test_plot_calibration_takes_styles_of_posteriors():
    alpha = torch.linspace(0, 1, 11)
    names = ("flow", "refined")
    fig, axes = plot_calibration(
        {name: torch.randint(0, 101, (50, 1)) for name in names},
        {name: (alpha, alpha) for name in names},
        num_posterior_samples=100,
        styles={"refined": {"lw": 3, "c": "0.5", "label": "refined, 50"}},
    )
    for ax in axes:
        _, flow, refined = ax.lines
        assert to_hex(flow.get_color()) in OKABE_ITO and flow.get_linewidth() < 3
        assert refined.get_color() == "0.5" and refined.get_linewidth() == 3
        assert refined.get_linestyle() == "--"  # its own, as before
    shown = [text.get_text() for text in fig.legends[0].get_texts()]
    assert shown == ["calibrated, 95 %", "flow", "refined, 50"]


SCORES = {
    "NPE": {10_000: [0.6, 0.64], 1_000: torch.tensor([0.7, 0.9, 0.8])},
    "refined": {1_000: np.array([0.57, 0.59]), 10_000: [0.53], 100_000: 0.51},
    "published": {1_000: 0.725, 10_000: 0.606},
}


def test_plot_c2st_draws_means_and_spread_of_the_seeds():
    fig, ax = plot_c2st(SCORES, fig_kwargs={"figsize": (4, 3), "dpi": 80})
    assert tuple(fig.get_size_inches()) == (4, 3) and fig.dpi == 80
    assert ax.get_xscale() == "log"
    curves = {part.get_label(): part for part in ax.containers}
    # Standard deviations of 0.7, 0.8, 0.9 and of 0.6, 0.64, by hand.
    line, _, (bars,) = curves["NPE"].lines
    np.testing.assert_allclose(line.get_xydata(), [[1_000, 0.8], [10_000, 0.62]])
    ends = [segment[:, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(ends[0], [0.7, 0.9], rtol=1e-6)
    np.testing.assert_allclose(ends[1], 0.62 + 0.04 / 2**0.5 * np.array([-1, 1]))
    line, _, (bars,) = curves["refined"].lines
    points = [[1_000, 0.58], [10_000, 0.53], [100_000, 0.51]]
    np.testing.assert_allclose(line.get_xydata(), points)
    # Of one seed there is no bar.
    assert [len(segment) for segment in bars.get_segments()] == [2, 0, 0]
    assert not curves["published"].has_yerr
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == list(SCORES)


def test_plot_c2st_tells_methods_apart_without_colours():
    _, ax = plot_c2st({f"method {i}": {1_000: 0.6, 10_000: 0.5} for i in range(7)})
    lines = [part.lines[0] for part in ax.containers]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 7
    assert len({line.get_marker() for line in lines}) == 7  # of a single budget
    assert {to_hex(line.get_color()) for line in lines} <= OKABE_ITO


def test_plot_c2st_draws_into_given_axes_with_given_styles():
    fig, (first, second) = plt.subplots(1, 2)
    styles = {"published": {"color": "0.5", "label": "NPE, published", "ls": ":"}}
    figure, ax = plot_c2st(SCORES, ax=second, styles=styles)
    assert figure is fig and ax is second
    assert not first.has_data() and second.get_legend() is None
    line = second.containers[2].lines[0]
    assert line.get_color() == "0.5" and line.get_linestyle() == ":"
    assert second.get_legend_handles_labels()[1][-1] == "NPE, published"


@pytest.mark.parametrize("nothing", [{}, {"NPE": {}}, {"NPE": {1_000: []}}])
def test_plot_c2st_says_what_it_needs(nothing):
    with pytest.raises(ValueError, match="no C2ST of (NPE|any)"):
        plot_c2st(nothing)


def test_plot_c2st_leaves_nothing_out():
    _, ax = plot_c2st({"a": {1_000: [0.46, 0.44], 100: [0.47]}})
    assert ax.get_ylim()[0] < 0.45
    _, panels = plt.subplots(1, 2, sharey=True)
    for panel, c2st in zip(panels, (0.44, 0.6), strict=True):
        plot_c2st({"a": {1_000: c2st}}, ax=panel)
    assert panels[0].get_ylim() == panels[1].get_ylim() and panel.get_ylim()[0] < 0.44
    for num, values in ((100, [0.7, np.nan]), (0, [0.7])):
        with pytest.raises(ValueError, match=rf"positive.*c2st\['a'\]\[{num}\]"):
            plot_c2st({"a": {1_000: 0.6, num: values}})


@pytest.mark.parametrize(
    ("plot", "example"),
    [
        (lambda: plot_training(object()), "summary .* inference.summary; got object"),
        (lambda: plot_corner(torch.randn(9, 2)), "samples .* got Tensor"),
        (lambda: plot_calibration(torch.ones(9, 2)), "ranks .* got Tensor"),
        (lambda: plot_calibration(coverage=(1, 2)), "coverage .* got tuple"),
        (lambda: plot_c2st([0.7, 0.8]), "c2st must be a mapping.* got list"),
        (lambda: plot_c2st({"a": [0.7]}), r"c2st\['a'\] must be.*{1_000.* got list"),
    ],
)
def test_what_has_no_names_is_refused(plot, example):
    with pytest.raises(TypeError, match=example):
        plot()
