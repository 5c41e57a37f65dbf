"""The site builds without a warning, and says what the code and the report say."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sphinx.util.inventory import InventoryFile

import sbi_jeffreys

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "tasks/reports"
CELL = r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going"]
    command += ["--quiet", "--builder", "html", "--doctree-dir", str(out / "doctrees")]
    result = subprocess.run(
        [*command, str(ROOT / "docs"), str(out / "html")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    return out / "html"


def test_the_site_has_every_page(site):
    for folder in ("docs", "tutorials"):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / "docs") if folder == "docs" else None
            inside = inside or Path("tutorials") / path.relative_to(ROOT / folder)
            if {"build", "jupyter_execute", ".ipynb_checkpoints"} & {*inside.parts}:
                continue
            is_page = path.suffix == ".ipynb" or (
                folder == "docs" and path.suffix == ".md"
            )
            if is_page and inside.parts[0] != "reports":
                assert (site / inside).with_suffix(".html").exists(), inside
    assert (site / "reports/against_npe_1000/report.html").exists()


def test_all_that_is_exported_is_in_the_reference(site):
    content = (site / "objects.inv").read_bytes()
    inventory = InventoryFile.loads(content, uri="")
    names = set(inventory.data["py:class"]) | set(inventory.data["py:function"])
    exported = {f"sbi_jeffreys.{name}" for name in sbi_jeffreys.__all__}
    assert exported - names - {"sbi_jeffreys.__version__"} == set()


def test_formulas_of_docstrings_are_formulas(site):
    for page in (site / "api").glob("*.html"):
        text = re.sub(r"<pre>.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        assert "$" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL), (
            page
        )
    assert r"\lambda_1 D_1" in (site / "method.html").read_text()


def rows_of(page):
    """Return the rows of all tables of a page of the site, as texts of their cells."""
    return [
        [re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(CELL, row, re.S)]
        for row in re.findall(r"<tr.*?>(.*?)</tr>", page.read_text(), re.S)
    ]


@pytest.fixture(scope="module")
def c2st():
    """C2ST of the benchmark by task, seed and observation, a column for each method."""
    rows = pd.read_csv(REPORTS / "against_npe_1000/results.csv")
    return rows.pivot_table("c2st", ["task", "seed", "observation"], "method")


@pytest.fixture(scope="module")
def unbounded():
    """C2ST of the default before energies had a bound."""
    rows = pd.read_csv(REPORTS / "unbounded_1000/results.csv")
    return rows.pivot_table("c2st", ["task", "seed", "observation"], "method")


@pytest.fixture(scope="module")
def unscreened():
    """C2ST of the default before outputs that say nothing were left out."""
    rows = pd.read_csv(REPORTS / "unscreened_1000/results.csv")
    return rows.pivot_table("c2st", ["task", "seed", "observation"], "method")


@pytest.fixture(scope="module")
def with_surrogates(unbounded):
    """C2ST of that default beside that without surrogates, of the seeds of both."""
    rows = pd.read_csv(REPORTS / "network_1000/results.csv")
    alone = rows.pivot_table("c2st", ["task", "seed", "observation"], "method")
    return unbounded.join(alone, how="inner")


@pytest.fixture(scope="module")
def training_ratios():
    """Training times of both presets over NPE's, by task."""
    rows = pd.read_csv(REPORTS / "presets_1000/rows.csv")
    seconds = rows.pivot_table("seconds", "task", "variant").dropna()
    return {
        (preset, flow): seconds[variant] / seconds[f"npe, {flow}"]
        for preset, variant in (("default", "jeffreys"), ("fast", "jeffreys, fast"))
        for flow in ("maf", "nsf")
    }


def geometric_mean(values):
    return np.exp(np.log(values.dropna()).mean())


def test_the_figures_are_those_of_the_report(site, c2st):
    shown = rows_of(site / "benchmarks.html")
    header, by_task = shown[0], c2st.groupby("task").mean()
    assert set(header[1:]) == set(by_task.columns)
    for task, means in by_task.iterrows():
        expected = [task, *(f"{means[method]:.3f}" for method in header[1:])]
        assert expected in shown


def test_the_figures_of_more_simulations_are_those_of_their_report(site):
    rows = pd.read_csv(REPORTS / "against_npe_10000/results.csv")
    means = rows.pivot_table("c2st", "task", "method")
    shown = rows_of(site / "benchmarks.html")
    for task, scores in means.iterrows():
        cells = ["–" if pd.isna(score) else f"{score:.3f}" for score in scores]
        assert [task, *cells] in shown
    header = next(row for row in shown if len(row) == 1 + means.shape[1])
    assert set(header[1:]) == set(means.columns)
    complete = means.dropna()
    averages = ["mean", *(f"{score:.3f}" for score in complete.mean())]
    assert (averages in shown) == (len(complete) > 1)


def test_the_gains_with_images_are_those_of_the_study():
    rows = pd.read_csv(REPORTS / "images_1000/rows.csv")
    gains = rows.pivot_table("gain", "seed", "model")
    assert len(gains) == 5
    readme, page = (ROOT / "README.md").read_text(), ROOT / "docs/how_to/embedding.md"
    mean, spread = gains.mean(), gains.std()
    refined = f"{mean['refined']:.2f} ± {spread['refined']:.2f}"
    flow = f"{mean['flow']:.2f} ± {spread['flow']:.2f}"
    assert refined in readme
    assert f"{flow} nats over NPE and the refined posterior {refined}" in " ".join(
        page.read_text().split()
    )
    assert (gains["refined"] > 0).all()
    losses = gains["flow"][gains["flow"] < 0]
    assert [f"{-loss:.2f}" for loss in losses] == ["0.09"]


def test_every_loss_of_the_benchmark_is_shown(site, c2st):
    shown = rows_of(site / "when_not_to_use.html")
    by_seed = c2st.groupby(["task", "seed"]).mean()
    pairs = [(us, npe) for us in c2st if "jeff" in us for npe in c2st if "npe" in npe]
    for us, peer in [*pairs, ("jeffreys_refined", "jeffreys")]:
        for task, loss in (by_seed[us] - by_seed[peer]).groupby("task"):
            num = f"{(loss > 0).sum()} of {len(loss)}"
            row = [
                task,
                us,
                peer,
                *(f"{by_seed.loc[task][m].mean():.3f}" for m in (us, peer)),
            ]
            row += [f"{loss.mean():+.3f} ± {loss.std():.3f}", num]
            assert (row in shown) == (loss > 0).any(), row


def test_every_loss_of_calibration_is_shown(site):
    shown = rows_of(site / "when_not_to_use.html")
    rows = pd.read_csv(REPORTS / "calibration_1000/comparison.csv")
    num = 0
    for row in rows.itertuples():
        worse_by = f"{row.difference:+.3f} ± {2 * row.standard_error:.3f}"
        is_shown = any(
            cells[:3] == [row.task, row.method, row.peer] and cells[-1] == worse_by
            for cells in shown
        )
        worse = row.difference > 2 * row.standard_error
        assert is_shown == worse, row
        num += worse
    assert num > 0


def test_every_loss_of_the_surrogates_is_shown(site, with_surrogates):
    shown = rows_of(site / "when_not_to_use.html")
    num = 0
    for name, us in (("refined", "jeffreys_refined"), ("flow", "jeffreys")):
        alone = us.replace("jeffreys", "jeffreys_network")
        for task, part in with_surrogates.groupby("task"):
            loss = (part[us] - part[alone]).groupby("seed").mean()
            cells = [task, name, f"{part[us].mean():.3f}", f"{part[alone].mean():.3f}"]
            cells.append(f"{loss.mean():+.3f} ± {loss.std():.3f}")
            assert (cells in shown) == (loss.mean() >= 0.0005), cells
            num += cells in shown
    assert num > 0


def test_every_loss_in_density_estimation_is_shown(site):
    shown = [row[-2] for row in rows_of(site / "when_not_to_use.html") if len(row) == 7]
    rows = pd.read_csv(ROOT / "docs/density/results.csv").fillna({"setting": ""})
    rows = rows.set_index(["study", "dataset", "setting", "seed"])
    ours = rows[rows["method"] == "jeffreys"]
    num = 0
    for peer in ("nf", "ebm", "ebm_langevin", "wgan", "dual"):
        theirs = rows[rows["method"] == peer]
        for quantity, other in (
            ("nll_best", "nll_best"),
            ("nll_last", "nll_last"),
            ("nll_refined", "nll_best"),
            ("frechet", "frechet"),
        ):
            loss = (ours[quantity] - theirs[other]).dropna()
            for _, part in loss.groupby(["study", "dataset", "setting"]):
                if part.mean() > 0:
                    assert f"{part.mean():+.3f} ± {part.sem():.3f}" in shown
                    num += 1
    assert num > 0


def test_training_times_are_those_of_the_rows(site, training_ratios):
    pages = [site / "speed.html", site / "index.html", site / "when_not_to_use.html"]
    for page in pages:
        text = re.sub(r"<.*?>", "", page.read_text())
        for flow in ("maf", "nsf"):
            ratio = geometric_mean(training_ratios["default", flow])
            assert f"{ratio:.1f} times as long as NPE ({flow})" in text, page
    shown = rows_of(pages[-1])
    for (preset, flow), ratios in training_ratios.items():
        row = [preset, f"NPE {flow}", f"{geometric_mean(ratios):.1f}"]
        row += [f"{ratios.min():.1f} to {ratios.max():.1f}", str(len(ratios))]
        assert row in shown


def test_the_table_of_the_surrogates_is_that_of_the_rows(site, with_surrogates):
    columns = ["jeffreys_refined", "jeffreys_network_refined"]
    columns += ["jeffreys", "jeffreys_network"]
    expected = with_surrogates[columns].groupby("task").mean()
    expected.loc["mean"] = expected.mean()
    shown = rows_of(site / "how_to/networks.html")
    for task, means in expected.iterrows():
        assert [task, *(f"{mean:.3f}" for mean in means)] in shown


def test_the_tables_of_bound_and_screening_are_those_of_the_rows(
    site, c2st, unbounded, unscreened
):
    shown = rows_of(site / "how_to/networks.html")
    bounded = unscreened.combine_first(c2st)
    for now, before in ((bounded, unbounded), (c2st, unscreened)):
        both = now.join(before.add_suffix(" before"), how="inner")
        expected = both.groupby("task").mean()
        expected.loc["mean"] = expected.mean()
        for task, means in expected.iterrows():
            cells = [
                f"{means[method + when]:.3f}"
                for method in ("jeffreys_refined", "jeffreys")
                for when in ("", " before")
            ]
            assert [task, *cells] in shown


def test_the_readme_says_what_the_rows_say(
    c2st, unbounded, unscreened, with_surrogates, training_ratios
):
    readme = " ".join((ROOT / "README.md").read_text().split())
    for (_, flow), ratios in training_ratios.items():
        ratio = geometric_mean(ratios)
        assert f"{ratio:.1f} times as long as with NPE ({flow})" in readme
    rows = pd.read_csv(REPORTS / "likelihood_1000/rows.csv")
    seconds = rows.pivot_table("seconds", "task", "variant")
    ratios = seconds["jeffreys"] / seconds["without likelihoods"]
    networks = " ".join((ROOT / "docs/how_to/networks.md").read_text().split())
    assert f"{ratios.min():.1f} to {ratios.max():.1f} times as long" in networks
    assert f"geometric mean of {geometric_mean(ratios):.1f}" in networks

    means = with_surrogates.groupby("task").mean()
    refined = means[["jeffreys_network_refined", "jeffreys_refined"]]
    gains = refined["jeffreys_network_refined"] - refined["jeffreys_refined"]
    for task in gains[gains.abs() > 0.02].index:
        before, after = refined.loc[task]
        assert f"{task} ({before:.3f} to {after:.3f})" in readme
    before, after = refined.mean()
    assert f"from {before:.3f} to {after:.3f}" in readme

    by_seed = c2st.groupby(["seed", "task"]).mean().groupby("seed").mean()
    for method, name in (("jeffreys_refined", "refined"), ("npe_nsf", "NPE (nsf)")):
        values = [f"{value:.3f}" for value in by_seed[method]]
        assert f"{name} {', '.join(values[:-1])} and {values[-1]}" in readme
    by_task = c2st.groupby(["task", "seed"]).mean()
    assert "nowhere, with none of the seeds, nor is the refined posterior" in readme
    for us in ("jeffreys", "jeffreys_refined"):
        for peer in ("npe_maf", "npe_nsf"):
            assert (by_task[us] < by_task[peer]).all()
    assert (by_task["jeffreys_refined"] < by_task["jeffreys"]).all()
    both = unscreened.combine_first(c2st)
    both = both.loc[both.index.isin(unbounded.index)]
    bounded = both["jeffreys_refined"].groupby("task").mean().mean()
    assert (
        f"fresh samples to learn with and to be judged by, takes it to {bounded:.3f}"
        in readme
    )


def test_the_page_on_rounds_says_what_the_rows_say():
    rows = pd.read_csv(REPORTS / "sequential_1000/results.csv")
    table = rows.pivot_table(
        index=["task", "seed"],
        columns="method",
        values=["c2st", "training_seconds"],
    )
    page = " ".join((ROOT / "docs/how_to/rounds.md").read_text().split())
    assert "With every seed, on both tasks, ours was better than `snpe`" in page
    c2st = table["c2st"]
    assert c2st.shape == (6, 3)  # two tasks, three seeds
    assert (c2st["sjeffreys"] < c2st["snpe"]).all()
    assert (c2st["sjeffreys_refined"] < c2st["snpe"]).all()
    assert "trainings of `sjeffreys` took five times as long" in page
    seconds = table["training_seconds"].mean()
    assert round(seconds["sjeffreys"] / seconds["snpe"]) == 5


def test_the_readme_has_figures_of_the_report():
    numbers: dict[str, set[str]] = {}
    for path in (ROOT / "tasks/reports").glob("*/c2st.csv"):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["mean"]:
                    text = f"{float(row['mean']):.3f}"
                    numbers.setdefault(row["task"], set()).add(text)
    shown = 0
    for line in (ROOT / "README.md").read_text().splitlines():
        task = re.match(r"\| `?(\w+)`? \|", line)
        if task and task[1] in numbers:
            found = set(re.findall(r"\d\.\d{3}", line))
            assert found and found <= numbers[task[1]], line
            shown += 1
    assert shown >= 8


def test_the_readme_says_what_the_rows_of_more_simulations_say(site):
    rows = pd.read_csv(REPORTS / "against_npe_10000/results.csv")
    means = rows.pivot_table("c2st", "task", "method")
    refined = means["jeffreys_refined"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert len(refined.dropna()) == 10
    assert f"mean of **{refined.mean():.3f}** over the ten tasks" in readme
    assert f"{refined.mean():.3f}" in (site / "benchmarks.html").read_text()
    tasks = ["two_moons", "slcp", "gaussian_mixture", "sir"]
    ours, theirs = (
        [f"{means.loc[task, method]:.3f}" for task in tasks]
        for method in ("jeffreys_refined", "npe_nsf")
    )
    assert list(means["npe_nsf"].dropna().index) == sorted(tasks)
    assert f"refined {', '.join(ours[:-1])} and {ours[-1]} on" in readme
    assert f"NPE {', '.join(theirs[:-1])} and {theirs[-1]}." in readme
    seconds = rows[rows.method == "jeffreys_refined"].training_seconds / 60
    assert f"took {seconds.min():.0f} to {seconds.max():.0f} minutes" in readme
