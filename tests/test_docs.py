"""The site builds without a warning, and says what the code and the report say."""

import inspect
import json
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
from sbi_jeffreys import diagnostics

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "tasks/reports"
CELL = r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>"
BENCHMARKED = ("npe_maf", "npe_nsf")

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


def text_of(path):
    """Return the text of a page of the repository, with single spaces."""
    return " ".join((ROOT / path).read_text().split())


def line_of_readme(start):
    """Return the line of the README that begins like this."""
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(start))
    return line


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
def unscaled():
    """C2ST of the default before flows had a scale."""
    rows = pd.read_csv(REPORTS / "unscaled_1000/results.csv")
    return rows.pivot_table("c2st", ["task", "seed", "observation"], "method")


@pytest.fixture(scope="module")
def in_sample():
    """C2ST of the default before residuals were those without the simulation."""
    rows = pd.read_csv(REPORTS / "in_sample_1000/results.csv")
    return rows.pivot_table("c2st", ["task", "seed", "observation"], "method")


@pytest.fixture(scope="module")
def normal_scores():
    """C2ST of the default before outputs had scales and surrogates imagined others."""
    rows = pd.read_csv(REPORTS / "normal_scores_1000/results.csv")
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
    averages = (f"{by_task[method].mean():.3f}" for method in header[1:])
    assert [f"mean of all {len(by_task)}", *averages] in shown


def test_the_figures_of_fewer_simulations_are_those_of_their_report(site, c2st):
    rows = pd.read_csv(REPORTS / "against_npe_300/results.csv")
    means = rows.pivot_table("c2st", "task", "method")
    assert rows["seed"].nunique() == 1 and means.notna().all(axis=None)
    shown = rows_of(site / "benchmarks.html")
    for task, scores in means.iterrows():
        assert [task, *(f"{score:.3f}" for score in scores)] in shown
    averages = (f"{score:.3f}" for score in means.mean())
    assert [f"mean of all {len(means)}", *averages] in shown
    refined, of_npe = means["jeffreys_refined"], means[[*BENCHMARKED]]
    assert (means["jeffreys"] < of_npe.min(axis=1)).all()
    assert (refined < of_npe.min(axis=1)).all()
    of_more = c2st[[*BENCHMARKED]].groupby("task").mean().min(axis=1).loc[means.index]
    ahead = refined < of_more
    (behind,) = refined.index[~ahead]
    readme = text_of("README.md")
    assert (
        f"nearer to the truth than the better NPE with 1,000 on all tasks but {behind}."
    ) in readme
    cells = (f"{of_npe[peer].mean():.3f}" for peer in BENCHMARKED)
    row = f"| **{refined.mean():.3f}** | {' | '.join(cells)} |"
    assert row in line_of_readme("| 300, **one seed**")
    of_1000 = c2st[["jeffreys_refined", *BENCHMARKED]].groupby("task").mean().mean()
    us, *peers = (f"{value:.3f}" for value in of_1000)
    assert f"| **{us}** | {' | '.join(peers)} |" in line_of_readme("| 1,000, ")


def test_the_figures_of_more_simulations_are_those_of_their_report(site):
    rows = pd.read_csv(REPORTS / "against_npe_10000/results.csv")
    means = rows.pivot_table("c2st", "task", "method")
    shown = rows_of(site / "benchmarks.html")
    for task, scores in means.iterrows():
        cells = ["–" if pd.isna(score) else f"{score:.3f}" for score in scores]
        assert [task, *cells] in shown
    header = next(row for row in shown if len(row) == 1 + means.shape[1])
    assert set(header[1:]) == set(means.columns)
    complete, averages = means.dropna(), means.mean(skipna=False)
    assert averages.notna().any() and averages.isna().any()
    cells = ["–" if pd.isna(score) else f"{score:.3f}" for score in averages]
    assert [f"mean of all {len(means)}", *cells] in shown
    tasks = ["gaussian_linear_uniform", "gaussian_mixture", "lotka_volterra", "sir"]
    assert list(complete.index) == [*tasks, "slcp", "two_moons"]
    cells = [f"{score:.3f}" for score in complete.mean()]
    assert [f"mean of {', '.join(tasks)}, slcp and two_moons", *cells] in shown
    ours = rows[rows["method"] == "jeffreys_refined"]
    minutes = ours.groupby("task")["training_seconds"].first() / 60
    text = " ".join(
        re.sub(r"<.*?>", "", (site / "benchmarks.html").read_text()).split()
    )
    for task, value in minutes.items():
        assert f"{task} {value:.1f}" in text
    *slow, last = minutes[minutes > 20].index
    assert f"twenty minutes is missed on {', '.join(slow)} and {last}." in text


def test_other_methods_of_one_round_lose_as_the_page_says():
    rows = pd.read_csv(REPORTS / "single_round_1000/results.csv")
    scores = rows.pivot_table("c2st", ["task", "seed", "observation"], "method")
    page = text_of("docs/benchmarks.md")
    others = [m for m in scores if "jeffreys" not in m and m not in BENCHMARKED]
    assert set(others) >= {"fmpe", "npse", "nre", "npe_mdn", "npe_zuko_nsf"}
    of_nle = scores.dropna(subset="nle").groupby("task")
    with_nle, num = of_nle.mean(), of_nle.size()
    assert len(with_nle) == 10
    first, others_of_nle = page.split("of ten observations: ")[1].split("first three: ")
    for task, row in with_nle[["nle", "jeffreys", "jeffreys_refined"]].iterrows():
        text = f"{task} {', '.join(f'{score:.3f}' for score in row)}"
        assert text in {10: first, 3: others_of_nle, 9: others_of_nle}[num[task]]
        assert (f"{text} (three seeds)" in page) == (num[task] == 9)
    lead = with_nle["nle"] - with_nle["jeffreys_refined"]
    assert list(lead[lead < 0].index) == ["bernoulli_glm"]
    assert (
        f"better on nine tasks, by {lead[lead > 0].min():.3f} at least, and **worse on "
        f"bernoulli_glm, by {-lead.min():.3f}**"
    ) in page
    loss = with_nle["jeffreys"] - with_nle["nle"]
    worse = loss[loss > 0].sort_values()
    assert list(worse.index) == ["slcp", "bernoulli_glm", "gaussian_linear_uniform"]
    assert (
        f"flow was worse there by {worse['bernoulli_glm']:.3f}, on "
        f"gaussian_linear_uniform by {worse['gaussian_linear_uniform']:.3f} and on "
        f"slcp by {worse['slcp']:.3f}"
    ) in page
    us, theirs, flow = (
        with_nle[name].map("{:.3f}".format)
        for name in ("jeffreys_refined", "nle", "jeffreys")
    )
    pair = f"{us['bernoulli_glm']} against {theirs['bernoulli_glm']} "
    losses = text_of("docs/when_not_to_use.md")
    assert (
        f"{pair}(three observations, three seeds); the flow there, "
        f"{flow['bernoulli_glm']}"
    ) in losses
    of_glm = scores.loc["bernoulli_glm"].dropna(subset="nle").groupby("seed").mean()
    each = [
        f"{row['nle']:.3f}, {row['jeffreys_refined']:.3f}"
        for _, row in of_glm.iterrows()
    ]
    assert len(each) == 3 and f"with each seed: {'; '.join(each)})" in page
    for task in ("gaussian_linear_uniform", "slcp"):
        assert f"on {task}, {flow[task]} against {theirs[task]}" in losses
    others.remove("nle")
    leads = {}
    for us in ("jeffreys", "jeffreys_refined"):
        pairs = scores[others].rsub(scores[us], axis=0)
        by_seed = pairs.groupby(["task", "seed"]).mean()
        assert not (by_seed >= 0).any(axis=None)
        leads[us] = -by_seed.groupby("task").mean().max(axis=None)
    assert (
        f"flow's smallest lead is {leads['jeffreys']:.3f}, the refined posterior's "
        f"{leads['jeffreys_refined']:.3f}, both on lotka_volterra"
    ) in page


def test_nle_on_bernoulli_glm_is_where_the_pages_say(c2st):
    rows = pd.read_csv(REPORTS / "nle_1000/results.csv")
    nle = rows.set_index(["task", "seed", "observation"])["c2st"].rename("nle")
    both = c2st.join(nle, how="inner")
    by_seed = both.groupby("seed").mean()
    assert len(both) == len(rows) == 10 * len(by_seed)
    assert rows["settings"].str.contains('"num_samples": 2000').all()
    assert (by_seed["jeffreys_refined"] < by_seed["nle"]).all()
    means = by_seed.mean()
    refined = f"{means['jeffreys_refined']:.3f}"
    figures = (
        f"NLE has {means['nle']:.3f}, {{}} {refined} and the flow "
        f"{means['jeffreys']:.3f} ({['one', 'two', 'three'][len(by_seed) - 1]} seeds, "
        "ten observations"
    )
    assert figures.format("today's refined posterior") in text_of("README.md")
    assert figures.format("the refined posterior") in text_of("docs/when_not_to_use.md")


def test_every_report_has_a_line_and_a_label_of_its_own(site):
    page = (ROOT / "docs/benchmarks.md").read_text()
    labels = dict(re.findall(r"^(\w.*) <(reports/\w+/report)>$", page, re.M))
    for report in REPORTS.glob("*/report.md"):
        name = f"reports/{report.parent.name}/report"
        assert name in labels.values(), name
        assert f"</{name}>`: " in page, name
    targets = re.findall(r"^\w.* <(reports/\w+/report)>$", page, re.M)
    assert len(labels) == len(set(targets)) == len(targets)


def test_the_gains_with_images_are_those_of_the_study():
    rows = pd.read_csv(REPORTS / "images_1000/rows.csv")
    gains = rows.pivot_table("gain", "seed", "model")
    assert len(gains) == 5
    readme, page = text_of("README.md"), ROOT / "docs/how_to/embedding.md"
    mean, spread = gains.mean(), gains.std()
    refined = f"{mean['refined']:.2f} ± {spread['refined']:.2f}"
    flow = f"{mean['flow']:.2f} ± {spread['flow']:.2f}"
    assert f"in five others it was better in each, by {refined} nats" in readme
    assert f"{flow} nats over NPE and the refined posterior {refined}" in " ".join(
        page.read_text().split()
    )
    assert (gains[["refined", "flow"]] > 0).all(axis=None)


def test_every_loss_of_the_benchmark_is_shown(site, c2st):
    shown = rows_of(site / "when_not_to_use.html")
    by_seed = c2st.groupby(["task", "seed"]).mean()
    num_losses = 0
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
            num_losses += (loss > 0).any()
    page = (site / "when_not_to_use.html").read_text()
    assert ("There is no loss." in page) == (num_losses == 0)


def test_every_loss_to_published_figures_is_shown(site):
    published = pd.read_csv(ROOT / "tasks/published/c2st.csv")
    published = published[published["source"] == "lueckmann2021"]
    shown = rows_of(site / "when_not_to_use.html")
    expected = []
    for budget in (1000, 10_000):
        rows = pd.read_csv(REPORTS / f"against_npe_{budget}/results.csv")
        means = rows.pivot_table("c2st", "task", "method")
        theirs = published[published["budget"] == budget]
        theirs = theirs.pivot(index="task", columns="method", values="c2st_mean")
        for us in ("jeffreys", "jeffreys_refined"):
            for task, ours in means[us].dropna().items():
                better = theirs.loc[task][theirs.loc[task] < ours]
                cells = ", ".join(f"{name} {mean:.3f}" for name, mean in better.items())
                if cells:
                    row = [f"{budget:,}", task, us, f"{ours:.3f}", cells]
                    expected.append(row)
    start = shown.index([
        *("simulations", "task", "ours", "C2ST ours", "published and better"),
    ])
    assert sorted(shown[start + 1 : start + 1 + len(expected)]) == sorted(expected)
    assert len(shown[start + 1 + len(expected)]) != len(expected[0])
    readme = text_of("README.md")
    for task, figure in (("bernoulli_glm", "0.634"), ("sir", "0.636")):
        assert f"{task} ({figure})" in readme
    assert "and lotka_volterra (0.909)" in readme
    refined = {row[1] for row in expected if row[0] == "1,000" and "refined" in row[2]}
    assert refined == {"bernoulli_glm", "sir", "lotka_volterra"}


def test_the_images_of_the_tutorial_are_scored_as_it_says():
    with open(ROOT / "tutorials/05_rich_data.ipynb") as file:
        cells = json.load(file)["cells"]
    texts = (out.get("text", "") for c in cells for out in c.get("outputs", []))
    printed = "".join("".join(text) for text in texts)
    names = ("NPE", "JeffreysNPE", "refined")
    c2st = [re.search(rf"^{n} .*mean (\d.\d\d)$", printed, re.M)[1] for n in names]
    gains = [
        re.search(rf"^{n} .*better than NPE by (.*)$", printed, re.M)[1]
        for n in names[1:]
    ]
    page = text_of("docs/when_not_to_use.md")
    of_npe, flow, refined = c2st
    assert (
        f"{of_npe} for NPE, {flow} for the flow and {refined} for the refined" in page
    )
    assert f"{' and '.join(gains)} nats" in page


@pytest.fixture(scope="module")
def rounds(unscaled):
    """C2ST at the first observation in ten rounds and in one, by task and seed."""
    rows = pd.read_csv(REPORTS / "sequential_1000/results.csv")
    ten = rows.pivot_table("c2st", ["task", "seed"], "method")
    assert ten.shape == (6, 3)  # two tasks, three seeds
    return ten.join(unscaled.xs(1, level="observation"))


@pytest.fixture(scope="module")
def rounds_of_1000():
    """C2ST at the first observation in ten rounds of 1,000, by task and seed."""
    rows = pd.read_csv(REPORTS / "sequential_10000/results.csv")
    c2st = rows.pivot_table("c2st", ["task", "seed"], "method")
    assert not c2st.isna().any(axis=None)
    seeds = (201, 202, 203)
    assert list(c2st.index) == [(t, s) for t in ("slcp", "two_moons") for s in seeds]
    return c2st


def test_rounds_lose_as_the_page_says(rounds):
    page, means = text_of("docs/when_not_to_use.md"), rounds.groupby("task").mean()
    for task, text in (
        ("two_moons", "{} (refined) and {} (flow), and worse with seed 203."),
        ("slcp", "On slcp they were better, {} and {}."),
    ):
        pairs = (
            f"{means.loc[task, f's{us}']:.3f} against {means.loc[task, us]:.3f}"
            for us in ("jeffreys_refined", "jeffreys")
        )
        assert text.format(*pairs) in page
    loss = rounds["sjeffreys_refined"] - rounds["jeffreys_refined"]
    assert list(loss[loss > 0].index) == [("two_moons", 203)]


def test_the_table_of_calibration_is_that_of_the_rows(site):
    shown = rows_of(site / "when_not_to_use.html")
    now, before = (
        pd.read_csv(REPORTS / name / "rows.csv").pivot(
            index="task", columns="method", values="sbc_area"
        )
        for name in ("calibration_1000", "calibration_network_1000")
    )
    both = now.join(before.drop(columns=[*BENCHMARKED]))
    columns = ["jeffreys_refined", "jeffreys"]
    columns += ["jeffreys_network_refined", "jeffreys_network", *BENCHMARKED]
    assert len(both) >= 9
    for task, errors in both[columns].iterrows():
        cells = ["–" if np.isnan(error) else f"{error:.3f}" for error in errors]
        assert [task, *cells] in shown


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
    shown = rows_of(site / "proxy.html")
    for task, means in expected.iterrows():
        assert [task, *(f"{mean:.3f}" for mean in means)] in shown


def test_the_tables_of_changes_to_the_default_are_those_of_the_rows(
    site, c2st, unbounded, unscreened, unscaled, in_sample, normal_scores
):
    bounded = unscreened.combine_first(unscaled)
    rows = pd.read_csv(REPORTS / "against_npe_1000/results.csv")
    is_of_few = rows["settings"].str.contains('"num_samples": 2000')
    few = set(rows.loc[is_of_few, "task"])
    assert len(few) == 4
    as_many = unscaled[~unscaled.index.isin(few, level="task")]
    for page, now, before in (
        ("proxy", bounded, unbounded),
        ("how_to/networks", unscaled, unscreened),
        ("method", in_sample, as_many),
        ("method", normal_scores, in_sample),
        ("proxy", c2st, normal_scores),
    ):
        shown = rows_of(site / f"{page}.html")
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
    c2st, unbounded, unscreened, unscaled, with_surrogates, training_ratios
):
    readme, proxy = text_of("README.md"), text_of("docs/proxy.md")
    for (_, flow), ratios in training_ratios.items():
        ratio = geometric_mean(ratios)
        assert f"{ratio:.1f} times as long as with NPE ({flow})" in readme
    rows = pd.read_csv(REPORTS / "likelihood_1000/rows.csv")
    seconds = rows.pivot_table("seconds", "task", "variant")
    ratios = seconds["jeffreys"] / seconds["without likelihoods"]
    assert f"{ratios.min():.1f} to {ratios.max():.1f} times as long" in proxy
    assert f"geometric mean of {geometric_mean(ratios):.1f}" in proxy

    means = with_surrogates.groupby("task").mean()
    refined = means[["jeffreys_network_refined", "jeffreys_refined"]]
    gains = refined["jeffreys_network_refined"] - refined["jeffreys_refined"]
    for task in gains[gains.abs() > 0.02].index:
        before, after = refined.loc[task]
        assert f"{task} ({before:.3f} to {after:.3f})" in proxy
    before, after = refined.mean()
    assert f"from {before:.3f} to {after:.3f}" in proxy

    by_seed = c2st.groupby(["seed", "task"]).mean().groupby("seed").mean()
    for method, name in (("jeffreys_refined", "refined"), ("npe_nsf", "NPE (nsf)")):
        values = [f"{value:.3f}" for value in by_seed[method]]
        assert f"{name} {', '.join(values[:-1])} and {values[-1]}" in readme
    by_task = c2st.groupby(["task", "seed"]).mean()
    assert "To NPE: never in this table, with any seed." in readme
    for us in ("jeffreys", "jeffreys_refined"):
        for peer in ("npe_maf", "npe_nsf"):
            assert (by_task[us] < by_task[peer]).all()
    behind = by_task["jeffreys_refined"] - by_task["jeffreys"]
    of_task = behind.groupby("task").mean()
    assert (of_task < 0).all()
    lost = behind[behind >= 0].groupby("task")
    assert lost.size().max() == 1
    listed = (f"{t} with one seed of three ({v:.3f})" for t, v in lost.sum().items())
    assert f"own flow: {'; '.join(listed)}, on no task in the mean." in readme
    assert "in the mean over the seeds its own flow on all ten tasks" in text_of(
        "docs/get_started.md"
    )
    spread = c2st.groupby(["task", "seed"]).mean().groupby("task").std().max()
    largest = max(spread["jeffreys"], spread["jeffreys_refined"])
    assert f"is at most {largest:.3f} for `JeffreysNPE`" in readme
    both = unscreened.combine_first(unscaled)
    both = both.loc[both.index.isin(unbounded.index)]
    bounded = both["jeffreys_refined"].groupby("task").mean().mean()
    assert (
        f"fresh samples to learn with and to be judged by, takes it to {bounded:.3f}"
        in proxy
    )
    assert f"mean over the tasks was {after:.3f}; the bound" in proxy


def test_the_readme_says_what_the_rows_of_learning_rate_and_presets_say():
    readme = text_of("README.md")
    rows = pd.read_csv(REPORTS / "ablation_1000/rows.csv")
    flow = rows[rows["model"] == "flow"].groupby("variant")["loss"].mean()
    faster = flow["npe, nsf, our learning rate"]
    gain, left = flow["npe, nsf"] - faster, faster - flow["without likelihoods"]
    assert (
        f"{gain:.2f} nats on fresh simulations, and stays {left:.2f} behind" in readme
    )
    rows = pd.read_csv(REPORTS / "presets_1000/rows.csv")
    loss = rows.groupby(["variant", "model"])["loss"].mean()
    fast = loss["jeffreys, fast", "refined"]
    behind, ahead = fast - loss["jeffreys", "refined"], loss["npe, nsf", "flow"] - fast
    assert f"is {behind:.2f} nats behind the default's and {ahead:.2f} ahead" in readme


def test_what_refined_samples_cost_is_said_alike():
    rows = re.findall(
        r"^\|[^|]*\|[^|]*\|[^|]*\| (\d+\.\d\d) \| (\d+\.\d\d) \|$",
        (ROOT / "docs/speed.md").read_text().split("refined / NPE's |")[1],
        re.M,
    )
    flow, npe = (sorted(map(float, column)) for column in zip(*rows[:3], strict=True))
    assert (
        f"{flow[0]:.1f} to {flow[-1]:.1f} times as long as the flow's, and "
        f"{npe[0]:.1f} to {npe[-1]:.1f} times as long as NPE's"
    ) in text_of("docs/how_to/refined.md")
    assert f"[{flow[0]:.0f} to {flow[-1]:.0f} times](how_to/refined.md)" in text_of(
        "docs/get_started.md"
    )


def test_the_page_on_rounds_says_what_the_rows_say(rounds, rounds_of_1000):
    page = text_of("docs/how_to/rounds.md")
    assert "every seed, on both tasks, ours was better than `snpe`, with both" in page
    ratios = []
    for name, c2st in (("1000", rounds), ("10000", rounds_of_1000)):
        for method in ("sjeffreys", "sjeffreys_refined"):
            assert (c2st[method] < c2st["snpe"]).all()
        rows = pd.read_csv(REPORTS / f"sequential_{name}/results.csv")
        seconds = rows.groupby("method")["training_seconds"].mean()
        ratios.append(f"{seconds['sjeffreys'] / seconds['snpe']:.0f} times as long")
    minutes = rows.query("method == 'sjeffreys'")["training_seconds"] / 60
    behind = [
        c2st[c2st["sjeffreys_refined"] > c2st["sjeffreys"]]
        for c2st in (rounds, rounds_of_1000)
    ]
    assert list(behind[0].index) == [("slcp", 201)]
    assert list(behind[1].index) == [("slcp", 201), ("two_moons", 202)]
    losses = (behind[1]["sjeffreys_refined"] - behind[1]["sjeffreys"]).round(3)
    assert losses.loc["two_moons", 202] == 0.001
    assert (
        "behind its flow on slcp with one seed of each size (201), and with rounds of "
        "1,000 by 0.001 on two_moons with one (202)"
    ) in page
    pair = behind[1][["sjeffreys_refined", "sjeffreys"]].iloc[0]
    text = "{:.3f} against {:.3f}, and on two_moons with one, by 0.001".format(*pair)
    assert text in text_of("docs/when_not_to_use.md")
    means = rounds_of_1000.groupby("task").mean().loc[["two_moons", "slcp"]]
    assert (
        "has a mean of {:.3f} on two_moons and {:.3f} on slcp, sbi's NPE in rounds "
        "{:.3f} and {:.3f}".format(*means["sjeffreys_refined"], *means["snpe"])
    ) in text_of("README.md")
    assert (
        f"trainings of `sjeffreys` took {minutes.min():.0f} to {minutes.max():.0f} "
        f"minutes with rounds of 1,000, which is {ratios[1]} as those of `snpe`, and "
        f"{ratios[0]} with rounds of 100"
    ) in page


def test_the_page_on_rounds_says_what_one_round_gives(rounds, rounds_of_1000):
    page = text_of("docs/how_to/rounds.md")
    for name, method in (("ten", "sjeffreys_refined"), ("one", "jeffreys_refined")):
        cells = []
        for task in ("two_moons", "slcp"):
            values = rounds.loc[task][method]
            cells += [f"{values.mean():.3f}", ", ".join(f"{v:.3f}" for v in values)]
        assert f"{name} round{'s' * (name == 'ten')} | {' | '.join(cells)} |" in page
    rows = pd.read_csv(REPORTS / "against_npe_10000/results.csv")
    one = rows.query("method == 'jeffreys_refined' and observation == 1")
    one = one.set_index(["task", "seed"])["c2st"]
    ten = rounds_of_1000["sjeffreys_refined"]
    keys = [("two_moons", 201), ("slcp", 201)]
    assert (
        "has {:.3f} on two_moons and {:.3f} on slcp".format(*(one[k] for k in keys))
        in page
    )
    assert (
        "ten rounds of 1,000 have {:.3f} and {:.3f}".format(*(ten[k] for k in keys))
        in page
    )


def test_the_table_of_the_readme_is_that_of_the_rows(c2st):
    means = c2st.groupby("task").mean()
    means.loc["mean"] = means.mean()
    lines = (ROOT / "README.md").read_text().splitlines()
    for task, row in means.iterrows():
        cells = [f"{row[m]:.3f}" for m in ("jeffreys_refined", "jeffreys")]
        cells += [f"{row[peer]:.3f}" for peer in BENCHMARKED]
        cells = [f"**{cell}**" if cell == min(cells) else cell for cell in cells]
        assert f"| {task} | {' | '.join(cells)} |" in lines


def test_the_readme_says_what_the_rows_of_more_simulations_say(site):
    rows = pd.read_csv(REPORTS / "against_npe_10000/results.csv")
    means = rows.pivot_table("c2st", "task", "method")
    refined = means["jeffreys_refined"]
    readme, page = text_of("README.md"), text_of("docs/benchmarks.md")
    assert len(refined.dropna()) == 10
    line = line_of_readme("| 10,000, **one seed**")
    assert f"| **{refined.mean():.3f}** |" in line
    assert f"{refined.mean():.3f}" in (site / "benchmarks.html").read_text()
    assert "NPE (maf) was run on seven tasks, NPE (nsf), FMPE, NPSE and NLE" in page
    assert len(means["npe_maf"].dropna()) == 7
    for peer in ("npe_nsf", "fmpe", "npse", "nle"):
        assert len(means[peer].dropna()) == 6
    for peer in ("npe_maf", "npe_nsf", "fmpe", "npse"):
        assert not (means[peer] <= refined).any()
    assert list(means.index[means["nle"] <= refined]) == ["slcp"]
    for peer in ("npe_nsf", "npe_maf"):
        assert not (means[peer] <= means["jeffreys"]).any()
    for peer in ("fmpe", "npse", "nle"):
        assert list(means.index[means[peer] < means["jeffreys"]]) == ["slcp"]
    slcp = means.loc["slcp"].map("{:.3f}".format)
    us, flow = slcp["jeffreys_refined"], slcp["jeffreys"]
    assert f"better on slcp, {slcp['nle']} against {us}**" in page
    assert (
        f"The flow is behind NLE ({slcp['nle']}), NPSE ({slcp['npse']}) and FMPE "
        f"({slcp['fmpe']}) on slcp, where it has {flow}."
    ) in page
    assert (
        f"loses to NLE on slcp, {us} against {slcp['nle']}; the flow there, {flow}, to "
        f"NLE, NPSE ({slcp['npse']}) and FMPE ({slcp['fmpe']})."
    ) in text_of("docs/when_not_to_use.md")
    assert f"on one of six, slcp, {us} against {slcp['nle']} (one seed" in readme
    of_nsf = rows[rows.method == "npe_nsf"].training_seconds / 60
    assert f"NPE (nsf) {of_nsf.min():.0f} to {of_nsf.max():.0f}." in page
    seconds = rows[rows.method == "jeffreys_refined"].training_seconds / 60
    assert f"took {seconds.min():.0f} to {seconds.max():.0f} minutes" in page


def test_the_readme_says_what_the_rows_of_calibration_say():
    rows = pd.read_csv(REPORTS / "calibration_1000/comparison.csv")
    num_bounds = rows["difference"].abs() / rows["standard_error"]
    beyond = rows[num_bounds > 2].assign(worse=rows["difference"] > 0)
    counts = beyond.groupby(["method", "peer", "metric", "worse"])["task"].agg(set)

    def tasks(method, peer, metric, worse):
        return counts.get((method, peer, metric, worse), set())

    refined, flow = "jeffreys_refined", "jeffreys"
    for metric in ("sbc", "atc"):
        for peer in BENCHMARKED:
            assert not tasks(refined, peer, metric, True)
        assert not tasks(flow, "npe_maf", metric, True)
        assert tasks(flow, "npe_nsf", metric, True) == {"gaussian_linear_uniform"}
    sizes = [
        len(tasks(refined, peer, metric, False))
        for peer in BENCHMARKED
        for metric in ("sbc", "atc")
    ]
    assert sizes == [9, 3, 2, 0]
    assert rows.loc[rows["peer"] == "npe_maf", "task"].nunique() == 10
    of_nsf = set(rows.loc[rows["peer"] == "npe_nsf", "task"])
    assert set(rows["task"]) - of_nsf == {"slcp_distractors"}
    assert (
        "is nowhere worse than NPE, with `maf` or with `nsf`; it is better than NPE "
        "(maf) on nine by SBC and three by TARP, than NPE (nsf) on two and none (NPE "
        "(nsf) could not be sampled on slcp_distractors). The flow alone is worse than "
        "NPE (nsf) on one, gaussian_linear_uniform, by both, than NPE (maf) on none"
    ) in text_of("README.md")


def test_the_page_on_trust_says_what_the_rows_of_the_alarms_say():
    rows = pd.read_csv(REPORTS / "alarms_1000/rows.csv").set_index(["task", "kind"])
    good, far = (rows.xs(kind, level="kind") for kind in ("good", "far"))
    page = text_of("docs/how_to/trust.md")
    everywhere = good["calibration"] == 1
    assert list(good.index[everywhere]) == ["slcp_distractors"] and len(good) == 10
    coverage = (100 * good["coverage_90"]).round().astype(int)
    assert (
        "slcp_distractors it objects to every observation, and is right: the flow's "
        f"90 % credible regions hold {coverage['slcp_distractors']} % of"
    ) in page
    narrow = coverage[~everywhere & (coverage < 86)].sort_values()
    assert list(narrow.index) == ["lotka_volterra", "slcp"]
    pair = "lotka_volterra and slcp, whose regions hold {} % and {} %"
    assert pair.format(*narrow) in page
    others = good.loc[~everywhere, "objected"]
    share = f"{others.mean():.1%}".replace("%", " %")
    assert (far["objected"] == 1).all() and others.max() <= 0.05
    assert (
        f"On the other nine tasks it objects to {share} of the good observations, and "
        "to all far ones"
    ) in page
    noisy = rows.xs("noisy", level="kind")["objected"]
    assert noisy["slcp"] == noisy[~everywhere].min() and noisy["sir"] == 1
    assert f"objects to {noisy['slcp']:.0%} of".replace("%", " %") in page


def test_how_long_trainings_took_and_how_poor_the_worst_are_is_said(c2st):
    rows = pd.read_csv(REPORTS / "against_npe_1000/results.csv")
    ours = rows[rows["method"] == "jeffreys"].groupby(["task", "seed"])
    seconds = ours["training_seconds"].first()
    took = f"took {seconds.min():.0f} to {seconds.max():.0f} s"
    assert f"{took}, {seconds.median():.0f} in the median" in text_of("README.md")
    assert f"{took}, each on one of two busy" in text_of("docs/get_started.md")
    poor = ["slcp", "slcp_distractors", "lotka_volterra"]
    assert (c2st.groupby("task").mean().loc[poor] > 0.84).all(axis=None)
    assert "above 0.84: after 1,000" in text_of("docs/when_not_to_use.md")


def test_what_is_said_of_the_scale_is_what_the_rows_say():
    folder = REPORTS / "scale_1000"
    comparison = pd.read_csv(folder / "comparison.csv")
    assert set(comparison["task"]) == {
        "lotka_volterra",
        "bernoulli_glm_raw",
        "slcp_distractors",
    }
    assert (comparison["verdict"] != "worse").all()
    losses = pd.read_csv(folder / "rows.csv").set_index(["task", "variant", "model"])
    distractors = losses["loss"].loc["slcp_distractors"].xs("flow", level="model")
    difference = distractors["jeffreys"] - distractors["without the flow's scale"]
    assert f"worse by {difference:.2f} nats" in text_of("docs/method.md")
    alarms = pd.read_csv(folder / "alarms.csv").set_index("kind")
    assert (alarms.loc["good", "coverage_90"] < 0.9).all()
    assert (alarms["calibration"] == 0).all()


def assert_has_table_of_losses(folder):
    """Assert that a report of before and now has the nats of its rows."""
    losses = pd.read_csv(folder / "rows.csv").pivot_table(
        "loss", ["variant", "model"], "task"
    )
    losses["mean"] = losses.mean(axis=1)
    lines = (folder / "report.md").read_text().splitlines()
    for keys, values in zip(losses.index, losses.to_numpy(), strict=True):
        (line,) = (e for e in lines if e.startswith(f"| {' | '.join(keys)} | "))
        shown = sorted(line.strip("| ").split(" | ")[2:])
        assert shown == sorted(f"{value:.2f}" for value in values)


def test_what_is_said_of_the_scales_of_outputs_is_what_the_rows_say(normal_scores):
    folder = REPORTS / "output_scales_1000"
    rows = pd.read_csv(folder / "results.csv")
    now = rows.pivot_table("c2st", ["task", "seed", "observation"], "method")
    before = normal_scores.add_suffix(" before")
    both = now.join(before, how="inner").groupby("task").mean()
    readme, page = text_of("README.md"), text_of("docs/when_not_to_use.md")
    report = (folder / "report.md").read_text()
    for task in both.index:
        cells = both.loc[task]
        assert (
            f"{cells['jeffreys_refined']:.3f} | {cells['jeffreys_refined before']:.3f} "
            f"| {cells['jeffreys']:.3f} | {cells['jeffreys before']:.3f} |"
        ) in report
    of_10000 = pd.read_csv(folder / "results_10000.csv").groupby("method")["c2st"]
    more = of_10000.mean()
    assert of_10000.size().tolist() == [10, 10]
    assert f"with today's surrogates it has {more['jeffreys_refined']:.3f}" in readme
    assert (
        f"the refined posterior has {more['jeffreys_refined']:.3f} there and the flow "
        f"{more['jeffreys']:.3f}"
    ) in page
    assert_has_table_of_losses(folder)


def test_where_the_default_is_worse_than_before_is_said(c2st, normal_scores):
    page = text_of("docs/when_not_to_use.md")
    before = normal_scores.add_suffix(" before")
    both = c2st.join(before, how="inner").groupby("task").mean()
    for of, name in (("jeffreys_refined", "refined posterior"), ("jeffreys", "flow")):
        change = both[of] - both[f"{of} before"]
        worse = change[change > 0.001].sort_values(ascending=False).index
        pairs = both[[of, f"{of} before"]].loc[worse]
        listed = (f"{task} {a:.3f} (was {b:.3f})" for task, a, b in pairs.itertuples())
        assert f"the {name} is worse on {', '.join(listed) or 'none'}" in page


def test_the_report_of_imagined_outputs_is_what_the_rows_say():
    folder = REPORTS / "imagined_1000"
    key = ["task", "seed", "observation"]
    now, before = (
        pd.read_csv(REPORTS / name / "results.csv").pivot_table("c2st", key, "method")
        for name in ("imagined_1000", "output_scales_1000")
    )
    both = now.join(before.add_suffix(" before"), how="inner")
    assert len(both) == len(now)
    both = both.groupby("task").mean()
    report = (folder / "report.md").read_text()
    for _, cells in both.iterrows():
        assert (
            f"{cells['jeffreys_refined']:.3f} | {cells['jeffreys_refined before']:.3f} "
            f"| {cells['jeffreys']:.3f} | {cells['jeffreys before']:.3f} |"
        ) in report
    assert_has_table_of_losses(folder)


def test_the_flow_that_ends_where_the_prior_ends_is_where_the_pages_say(c2st):
    folder = REPORTS / "leakage_1000"
    key = ["task", "seed", "observation"]
    now, before = (
        pd.read_csv(folder / f"{name}.csv").pivot_table("c2st", key, "method")
        for name in ("results", "results_before")
    )
    assert now.index.equals(before.index) and len(now) == 30
    # They are rows of the benchmark's.
    pd.testing.assert_frame_equal(c2st.loc[now.index, list(now)], now)
    means, of_before = now.mean(), before.mean()
    assert (
        f"| gaussian_linear_uniform | 3 | {means['jeffreys']:.3f} | "
        f"{of_before['jeffreys']:.3f} | {means['jeffreys_refined']:.3f} | "
        f"{of_before['jeffreys_refined']:.3f} |"
    ) in text_of(folder / "report.md")
    comparison = pd.read_csv(folder / "comparison.csv")
    assert len(comparison) == 8 and (comparison["verdict"] != "worse").all()
    assert "today's flow is worse than neither on gaussian_linear_uniform" in text_of(
        "README.md"
    )


def test_c2st_agrees_with_scikit_learns_as_the_page_says():
    rows = pd.read_csv(REPORTS / "c2st_accuracy/rows.csv")
    differences = np.stack([rows[f"ours_{s}"] - rows[f"sklearn_{s}"] for s in (1, 2)])
    assert len(rows) >= 30
    assert abs(differences).mean() < 0.005 and abs(differences).max() < 0.015
    mean = differences.mean(0)
    assert abs(mean.mean()) < 2 * mean.std(ddof=1) / len(mean) ** 0.5
    report = text_of("tasks/reports/c2st_accuracy/report.md")
    assert f"mean absolute {abs(differences).mean():.5f}" in report


def test_the_page_on_trust_has_the_thresholds_of_the_checks():
    page = text_of("docs/how_to/trust.md")
    assert f"differ by {diagnostics.MIN_DISAGREEMENT} nats or more" in page
    assert f"shares is {diagnostics.MIN_COVERAGE_ERROR:.0%} or more" in page.replace(
        " %", "%"
    )
    assert diagnostics.MAX_AGREEMENT == 1
    assert "differ by more than one nat" in page
    rate = inspect.signature(diagnostics.check_fit).parameters["false_alarm_rate"]
    assert rate.default == 0.05 and "is 5 % (`false_alarm_rate`)" in page
    assert f"{100 * rate.default / 3:.1f} % with three" in page
    assert f"{100 * rate.default / 4:.2f} % with four" in page
