"""The report's numbers against ones computed by hand."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks import TASKS
from tasks.__main__ import main
from tasks.errors import InputError
from tasks.methods import METHODS
from tasks.plots import _styles, c2st_against_budget, c2st_against_time
from tasks.plots import paired_differences as plot_paired_differences
from tasks.report import (
    count_unequal_pairs,
    expected_rows,
    in_order,
    paired_differences,
    published,
    summarise,
    summarise_pairs,
    write_report,
)
from tasks.results import COLUMNS, ERRORS, load, write_row


def row(task, method, budget, seed, observation, c2st, **columns) -> dict:
    numbers = {name: float("nan") for name in COLUMNS}
    return {
        **numbers,
        "task": task,
        "method": method,
        "budget": budget,
        "seed": seed,
        "observation": observation,
        "status": "ok",
        "c2st": c2st,
        "training_seconds": 2.0,
        "version_sbi_jeffreys": "0.1.0",
        "version_sbi": "0.27.0",
        "version_torch": "2.13.0",
        "finished": "2026-01-01T00:00:00+00:00",
        "settings": {"num_samples": 10_000},
        "warnings": [],
        **dict.fromkeys(ERRORS, ""),
        **columns,
    }


def failed(task, method, budget, seed, observation, error, message) -> dict:
    return row(
        task,
        method,
        budget,
        seed,
        observation,
        float("nan"),
        status="failed",
        error_type=error,
        error_message=message,
        traceback="Traceback",
    )


# C2ST by (seed, observation).
JEFFREYS = {(1, 1): 0.60, (1, 2): 0.70, (2, 1): 0.62, (2, 2): 0.64}
NPE = {(1, 1): 0.66, (1, 2): 0.72, (2, 1): 0.61, (2, 2): 0.69}


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "results"
    for method, values, seconds in (
        ("jeffreys", JEFFREYS, 30.0),
        ("npe_nsf", NPE, 10.0),
    ):
        for (seed, observation), c2st in values.items():
            write_row(
                folder,
                row(
                    *("two_moons", method, 1000, seed, observation, c2st),
                    training_seconds=seconds * seed,
                    epochs=100,
                ),
            )
            write_row(
                folder,
                row("gaussian_mixture", method, 1000, seed, observation, c2st + 0.1),
            )
    # A method with the least mean, from half of the observations.
    for seed in (1, 2):
        write_row(folder, row("two_moons", "nle", 1000, seed, 1, 0.5))
        bad = ("two_moons", "nle", 1000, seed, 2, "RuntimeError", "a | b\nc")
        write_row(folder, failed(*bad))
    write_row(folder, failed("two_moons", "nre", 1000, 1, 1, "ValueError", "broken"))
    return folder


def test_mean_and_spread_are_those_of_the_definition(results):
    summary = summarise(load(results))
    c2st = summary[summary["quantity"] == "c2st"].set_index(["task", "method"])

    cell = c2st.loc["two_moons", "jeffreys"]
    assert cell["mean"] == pytest.approx(0.64)  # of 0.65 and 0.63
    assert cell["std_seeds"] == pytest.approx(0.02 / math.sqrt(2))
    # Of 0.61 and 0.67.
    assert cell["std_observations"] == pytest.approx(0.06 / math.sqrt(2))
    assert (cell["rows"], cell["expected"], cell["failed"]) == (4, 4, 0)
    assert cell["best"]

    cell = c2st.loc["two_moons", "nle"]
    assert cell["mean"] == pytest.approx(0.5)
    assert (cell["rows"], cell["expected"], cell["failed"]) == (2, 4, 2)
    assert not cell["best"]
    assert math.isnan(cell["std_observations"])
    assert np.isnan(c2st.loc["two_moons", "nre"]["mean"])
    assert not c2st.loc["two_moons", "npe_nsf"]["best"]

    times = summary[summary["quantity"] == "training_seconds"]
    times = times.set_index(["task", "method"])["mean"]
    assert times["two_moons", "jeffreys"] == pytest.approx(45.0)


def test_summary_agrees_with_pandas_on_random_rows():
    generator = np.random.default_rng(3)
    rows = pd.DataFrame([
        row(
            *("slcp", method, budget, seed, observation),
            generator.uniform(0.5, 1.0),
            settings='{"num_samples": 10000}',  # text, as `load` gives it
        )
        for method in ("jeffreys", "fmpe")
        for budget in (1000, 10_000)
        for seed in range(4)
        for observation in range(1, 11)
    ])
    summary = summarise(rows)
    c2st = summary[summary["quantity"] == "c2st"].set_index(["budget", "method"])
    for (budget, method), group in rows.groupby(["budget", "method"]):
        cell = c2st.loc[(budget, method)]
        assert cell["mean"] == pytest.approx(group["c2st"].mean())
        by_seed = group.groupby("seed")["c2st"].mean()
        assert cell["std_seeds"] == pytest.approx(by_seed.std())
        by_observation = group.groupby("observation")["c2st"].mean()
        assert cell["std_observations"] == pytest.approx(by_observation.std())
    for budget, group in c2st.groupby("budget"):
        best = group.index[group["best"]].get_level_values("method")
        assert list(best) == [group["mean"].idxmin()[1]], budget


def test_paired_differences_are_of_the_same_simulations(results):
    differences = paired_differences(load(results), "jeffreys")
    moons = differences[differences["task"] == "two_moons"]
    found = {
        (peer, seed): (difference, observations)
        for peer, seed, difference, observations in zip(
            moons["peer"],
            moons["seed"],
            moons["difference"],
            moons["observations"],
            strict=True,
        )
    }
    assert found == {
        ("npe_nsf", 1): (pytest.approx((-0.06 - 0.02) / 2), 2),
        ("npe_nsf", 2): (pytest.approx((0.01 - 0.05) / 2), 2),
        # Only the observation that nle has.
        ("nle", 1): (pytest.approx(0.10), 1),
        ("nle", 2): (pytest.approx(0.12), 1),
    }
    expected = expected_rows(load(results))
    pairs = summarise_pairs(differences, expected).set_index(["peer", "task"])
    assert pairs.loc[("npe_nsf", "two_moons"), "mean"] == pytest.approx(-0.03)
    assert pairs.loc[("npe_nsf", "all tasks"), "mean"] == pytest.approx(-0.03)
    assert pairs.loc[("npe_nsf", "all tasks"), "better"] == 4
    assert pairs.loc[("nle", "two_moons"), "better"] == 0
    assert ("nle", "all tasks") not in pairs.index


def pair(task: str, seed: int, difference: float) -> dict:
    line = {"peer": "npe_nsf", "budget": 1000, "observations": 10}
    return {**line, "task": task, "seed": seed, "difference": difference}


def pairs_of(lines: list[dict]) -> pd.DataFrame:
    """Return the summary of differences of which none is missing."""
    table = pd.DataFrame(lines)
    expected = table.groupby(["task", "budget"])["observations"].sum()
    return summarise_pairs(table, expected)


def test_interval_of_two_seeds_is_students():
    # The 97.5 % quantile of t with one degree of freedom is 12.706.
    lines = [pair("slcp", 1, 0.0), pair("slcp", 2, 1.0)]
    (line,) = pairs_of(lines).to_dict("records")
    assert line["mean"] == 0.5
    assert line["low"] == pytest.approx(0.5 - 12.706 / 2, abs=1e-3)
    assert line["high"] == pytest.approx(0.5 + 12.706 / 2, abs=1e-3)
    assert (line["seeds"], line["better"]) == (2, 0)
    (line,) = pairs_of(lines[:1]).to_dict("records")
    assert math.isnan(line["low"]) and math.isnan(line["high"])


def test_intervals_of_few_seeds_hold_the_mean_as_often_as_they_say():
    generator = np.random.default_rng(0)
    lines = [
        pair(f"task{i}", seed, generator.normal(0.1, 0.02))
        for i in range(500)
        for seed in range(3)
    ]
    of_tasks = pairs_of(lines).query("task != 'all tasks'")
    holds = (of_tasks["low"] < 0.1) & (of_tasks["high"] > 0.1)
    # Of 500 the share has a standard error of 0.01.
    assert holds.mean() == pytest.approx(0.95, abs=0.03)


def test_interval_over_tasks_has_both_levels():
    # The variance of a task's mean is between² + within² / 4.
    generator = np.random.default_rng(0)
    for within in (0.0, 0.3):
        centres = generator.normal(0.0, 0.1, size=300)
        lines = [
            pair(f"task{t}", seed, centre + generator.normal(0.0, within))
            for t, centre in enumerate(centres)
            for seed in range(4)
        ]
        line = pairs_of(lines).set_index("task").loc["all tasks"]
        half = 1.96 * math.sqrt((0.1**2 + within**2 / 4) / 300)
        assert line["high"] - line["mean"] == pytest.approx(half, rel=0.1)
        assert line["mean"] - line["low"] == pytest.approx(half, rel=0.1)
        assert line["mean"] == pytest.approx(0.0, abs=1.5 * half)


def test_what_is_missing_is_marked_in_pairs_and_costs(results, tmp_path):
    # npe_nsf on one of three tasks, but for a row, and on another.
    for method in ("jeffreys", "fmpe"):
        write_row(results, row("slcp", method, 1000, 1, 1, 0.8))
    write_row(results, failed("two_moons", "npe_nsf", 1000, 2, 2, "OSError", "full"))
    rows = load(results)
    differences = paired_differences(rows, "jeffreys")
    pairs = summarise_pairs(differences, expected_rows(rows))
    pairs = pairs.set_index(["peer", "task"])[
        ["rows", "expected", "tasks", "all_tasks"]
    ]
    assert pairs.loc[("npe_nsf", "all tasks")].tolist() == [7, 8, 2, 3]
    assert pairs.loc[("npe_nsf", "two_moons")].tolist() == [3, 4, 1, 3]

    write_report([results], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert re.search(r"better \d/4, 2 of 3 tasks † 7/8 \|", text)
    assert re.search(r"\| 1,000 \| npe_nsf \|.*\| 2 of 3 \| 7/9 \|", text)
    assert re.search(r"\| 1,000 \| jeffreys \|.*\| 3 of 3 \| 9/9 \|", text)
    assert text.count("Hollow marks") == 2


def test_published_figures_are_copied_right():
    table = published().set_index(["source", "task", "budget", "method"])["c2st_mean"]
    lueckmann = table["lueckmann2021"]
    assert lueckmann["bernoulli_glm", 1000, "NPE"] == 0.863
    assert lueckmann["two_moons", 100_000, "SNRE"] == 0.563
    assert table["gensbi", "slcp", 30_000, "NPE"] == 0.84
    # The means over the ten tasks that the benchmark's authors' tables lead to.
    means = lueckmann.groupby(level=["method", "budget"]).agg(["mean", "size"])
    assert (means["size"] == 10).all()
    assert means.loc[("NPE", 1000), "mean"] == pytest.approx(0.837, abs=5e-4)
    assert means.loc[("NLE", 1000), "mean"] == pytest.approx(0.818, abs=5e-4)
    assert means.loc[("NPE", 100_000), "mean"] == pytest.approx(0.653, abs=5e-4)


def test_report_shows_what_there_is(results, capsys):
    assert main(["report", str(results)]) == 0
    out = results / "report"
    assert "21 rows, 3 of them failed" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text
        .split("## C2ST at 1,000 simulations")[1]
        .split("##")[0]
        .splitlines()
        if line.startswith("|")
    }
    assert lines["method"] == ["two_moons", "gaussian_mixture", "mean"]
    assert lines["jeffreys"] == [
        "**0.640 ± 0.014 (0.042)**",
        "**0.740 ± 0.014 (0.042)**",
        "**0.690**",
    ]
    assert lines["npe_nsf"][0] == "0.670 ± 0.028 (0.049)"
    assert lines["nle"] == ["0.500 ± 0.000 (–) † 2/4", "–", "–"]
    assert lines["nre"] == ["failed † 0/4", "–", "–"]
    theirs = published().set_index(["source", "task", "budget", "method"])
    moons = theirs.loc[("lueckmann2021", "two_moons", 1000, "NPE")]
    assert lines["*NPE, Lueckmann et al. 2021*"][0] == (
        f"{moons['c2st_mean']:.3f} ({moons['c2st_std']:.3f})"
    )
    # Failures are listed with where and why, in one line each.
    failures = text.split("## Failed rows")[1]
    assert "| two_moons | nle | 1000 | 2 | seed 1: 2; seed 2: 2 |" in failures
    assert "RuntimeError: a \\| b c |" in failures
    assert "ValueError: broken" in failures
    # Three times as long on each seed.
    assert re.search(r"\| 1,000 \| jeffreys \| 23.5 \| 1.73 \|", text)
    for plot in re.findall(r"\((\w+\.png)\)", text):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"\(\w+\.png\)", text)) == 3

    pd.testing.assert_frame_equal(load(out / "results.csv"), load(results))
    c2st = pd.read_csv(out / "c2st.csv")
    assert set(c2st["source"]) == {"measured", "lueckmann2021"}
    assert len(c2st) == 6 + 2 * 8


def test_rows_of_different_settings_have_no_mean(tmp_path):
    short = {"num_samples": 10_000, "train": {"max_num_epochs": 2}}
    whole = {"num_samples": 10_000, "train": {}}
    for seed, settings in ((1, short), (2, whole)):
        cell = ("slcp", "npe_nsf", 1000, seed, 1, 0.7)
        write_row(tmp_path / "mixed", row(*cell, settings=settings))
    with pytest.raises(InputError, match="npe_nsf on slcp at 1,000 .*max_num_epochs"):
        write_report([tmp_path / "mixed"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Of different methods, or with other numbers of samples, they are told apart.
    for method, settings in (("npe_nsf", short), ("jeffreys", whole)):
        cell = ("slcp", method, 1000, 1, 1, 0.7)
        write_row(tmp_path / "apart", row(*cell, settings=settings))
    write_report([tmp_path / "apart"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert '| npe_nsf | {"max_num_epochs": 2} |' in text
    assert "| jeffreys | {} |" in text


def test_default_settings_have_no_table(results, tmp_path):
    write_report([results], tmp_path / "out")
    assert "Arguments of train" not in (tmp_path / "out" / "report.md").read_text()


def test_a_report_has_room_for_more_tasks(tmp_path):
    names = [*TASKS, "one_of_my_own", "another"]
    for task in names:
        for method in ("jeffreys", "npe_nsf"):
            write_row(tmp_path / "r", row(task, method, 1000, 1, 1, 0.7))
    write_report([tmp_path / "r"], tmp_path / "out")
    assert "one_of_my_own" in (tmp_path / "out" / "report.md").read_text()
    rows = load(tmp_path / "r")
    differences = paired_differences(rows, "jeffreys")
    pairs = summarise_pairs(differences, expected_rows(rows))
    figure = plot_paired_differences(differences, pairs, "jeffreys")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    looks = {
        (mark.get_paths()[0].vertices.tobytes(), tuple(mark.get_facecolor()[0]))
        for mark, label in zip(handles, labels, strict=True)
        if label in names
    }
    assert len(looks) == len(names)


def test_fewer_samples_than_published_are_marked(results, tmp_path):
    few = {"num_samples": 2000}
    write_row(results, row("slcp", "npe_nsf", 1000, 1, 1, 0.9, settings=few))
    main(["report", str(results), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    assert re.findall(r"\| ([^|]*) ‡ \|", text) == ["**0.900 ± – (–)**"]
    assert text.count("‡") == 2  # the cell, and what it means
    table = pd.read_csv(tmp_path / "out/c2st.csv").set_index(["task", "method"])
    assert table.loc[("slcp", "npe_nsf"), "num_samples"] == 2000
    assert (
        table.loc["two_moons"].query("source == 'measured'").num_samples == 1e4
    ).all()


def test_cells_of_other_numbers_of_samples_are_not_compared(tmp_path):
    few = {"num_samples": 2000}
    for observation in (1, 2):
        for method, c2st in (("jeffreys", 0.7), ("npe_nsf", 0.8)):
            cell = ("slcp", method, 1000, 1, observation, c2st)
            write_row(tmp_path / "r", row(*cell))
        cell = ("slcp", "npe_maf", 1000, 1, observation, 0.6)
        write_row(tmp_path / "r", row(*cell, settings=few))
        cell = ("slcp", "nle", 1000, 1, observation, 0.5)
        write_row(
            tmp_path / "r",
            row(*cell, **({"settings": few} if observation == 2 else {})),
        )
    rows = load(tmp_path / "r")
    c2st = summarise(rows).query("quantity == 'c2st'").set_index("method")
    assert c2st.index[c2st["best"]].tolist() == ["jeffreys"]
    assert set(c2st.index[c2st["comparable"]]) == {"jeffreys", "npe_nsf"}
    sizes = c2st[["num_samples", "most_samples"]]
    assert sizes.loc["npe_maf"].tolist() == [2000, 2000]
    assert sizes.loc["nle"].tolist() == [2000, 10_000]

    differences = paired_differences(rows, "jeffreys").set_index("peer")
    assert differences["observations"].to_dict() == {"nle": 1, "npe_nsf": 2}
    assert differences["difference"].to_dict() == pytest.approx({
        "nle": 0.2,
        "npe_nsf": -0.1,
    })
    assert count_unequal_pairs(rows, "jeffreys") == 3

    write_report([tmp_path / "r"], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "| npe_maf | 0.600 ± – (0.000) § ‡ | – |" in text
    assert "| nle | 0.500 ± – (0.000) § ‡ | – |" in text
    assert "| jeffreys | **0.700 ± – (0.000)** | **0.700** |" in text
    assert "Left out are 3 rows of peers" in text


def test_tables_without_the_commit_are_read(results, tmp_path):
    table = load(results)
    old = tmp_path / "old.csv"
    table.drop(columns="commit").to_csv(old, index=False)
    assert (load(old)["commit"] == "").all()
    assert list(load(old).columns) == list(table.columns)
    table.drop(columns=["commit", "epochs"]).to_csv(old, index=False)
    with pytest.raises(InputError, match="epochs"):
        load(old)


def test_commits_are_texts_and_in_the_report(tmp_path):
    commits = ("863e46212345", "123456789012", "")
    for seed, commit in enumerate(commits):
        cell = ("slcp", "jeffreys", 1000, seed, 1, 0.7)
        write_row(tmp_path / "r", row(*cell, commit=commit, version_sbi="0.27"))
    write_report([tmp_path / "r"], tmp_path / "one")
    csv = tmp_path / "one/results.csv"
    assert load(csv)["commit"].tolist() == [*commits]
    write_report([csv], tmp_path / "two")
    one, two = ((tmp_path / d / "report.md").read_text() for d in ("one", "two"))
    assert one == two
    (line,) = re.findall(r"\| jeffreys \| (.*\(1\)) \|", two.split("## Versions")[1])
    assert sorted(line.split(", ")) == [
        "123456789012 (1)",
        "863e46212345 (1)",
        "unknown (1)",
    ]


def test_report_shows_what_can_be_drawn(tmp_path):
    unscored = float("nan")
    for method in ("jeffreys", "npe_nsf"):
        write_row(tmp_path / "mmd", row("slcp", method, 1000, 1, 1, unscored, mmd=0.1))
    write_report([tmp_path / "mmd"], tmp_path / "one")
    assert not list((tmp_path / "one").glob("*.png"))
    assert len(pd.read_csv(tmp_path / "one/results.csv")) == 2

    # No simulations that both have; and none whose training was timed.
    for seed, method in enumerate(("jeffreys", "npe_nsf")):
        cell = ("slcp", method, 1000, seed, 1, 0.7)
        write_row(tmp_path / "apart", row(*cell, training_seconds=float("nan")))
    write_report([tmp_path / "apart"], tmp_path / "two")
    plots = [path.name for path in (tmp_path / "two").glob("*.png")]
    assert plots == ["c2st_against_budget.png"]
    assert "in pairs" not in (tmp_path / "two/report.md").read_text()


def test_tables_are_written_before_plots(results, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("tasks.plots.c2st_against_time", broken)
    with pytest.raises(RuntimeError, match="no fonts"):
        write_report([results], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.csv", "summary.csv", "c2st.csv", "paired.csv"}


def test_report_of_a_table_is_that_of_its_folder(results, tmp_path):
    write_report([results], tmp_path / "one")
    write_report([tmp_path / "one" / "results.csv"], tmp_path / "two")
    for name in ("report.md", "summary.csv", "paired.csv", "c2st.csv"):
        one, two = ((tmp_path / d / name).read_text() for d in ("one", "two"))
        assert one == two


def test_report_can_do_without_pairs(results, tmp_path):
    write_report([results], tmp_path / "out", reference="snpe")
    assert "in pairs" not in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "paired_differences.png").exists()
    with pytest.raises(InputError, match="unknown method 'npe' to compare with.*nle"):
        write_report([results], tmp_path / "out", reference="npe")


def test_report_of_failures_alone(tmp_path):
    write_row(tmp_path / "r", failed("slcp", "nle", 1000, 1, 1, "OSError", "disk full"))
    write_report([tmp_path / "r"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "1 rows" in text and "OSError: disk full" in text


def test_plots_show_the_numbers(results):
    rows = load(results)
    figure = c2st_against_budget(rows, summarise(rows), published())
    axes = {panel.get_title(): panel for panel in figure.axes if panel.get_visible()}
    assert set(axes) == {"two_moons", "gaussian_mixture"}
    drawn = {part.get_label(): part for part in axes["two_moons"].containers}
    # Those of which there is nothing are not there.
    names = {"NPE, published", "NLE, published", "jeffreys", "npe_nsf", "nle"}
    assert set(drawn) == names
    # Half of the rows of nle are missing, none of the others.
    hollow = [
        line
        for line in axes["two_moons"].lines
        if line.get_markerfacecolor() == "white"
    ]
    assert [tuple(line.get_xydata()[0]) for line in hollow] == [(1000, 0.5)]
    theirs, *_ = drawn["NPE, published"].lines
    assert theirs.get_ydata() == pytest.approx(
        published()
        .query("source == 'lueckmann2021' and task == 'two_moons' and method == 'NPE'")
        .sort_values("budget")["c2st_mean"]
        .to_numpy()
    )
    # Of 0.65 and 0.63, the means of the two seeds.
    ours, _, (bar,) = drawn["jeffreys"].lines
    assert ours.get_xydata() == pytest.approx(np.array([[1000, 0.64]]))
    low, high = bar.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.02 / math.sqrt(2))
    assert {text.get_text() for text in figure.legends[0].get_texts()} == names


def test_the_plot_against_time_shows_the_numbers(results):
    write_row(
        results,
        row("two_moons", "jeffreys", 10_000, 1, 1, 0.55, training_seconds=400.0),
    )
    figure = c2st_against_time(summarise(load(results)))
    axes = {panel.get_title(): panel for panel in figure.axes if panel.get_visible()}
    assert set(axes) == {"two_moons", "gaussian_mixture"}
    panel = axes["two_moons"]
    drawn = {part.get_label(): part for part in panel.collections}
    # Those of which there is nothing may have a mark, but no place.
    there = {name for name, part in drawn.items() if len(part.get_offsets())}
    assert {name for name in there if not name.startswith("_")} == {
        "jeffreys",
        "npe_nsf",
        "nle",
    }
    # One row at 10,000 simulations is all that there is; of nle half is missing.
    hollow = [
        np.asarray(drawn[name].get_offsets())[0] for name in there if name[0] == "_"
    ]
    assert hollow == [pytest.approx([2.0, 0.5])]
    # Seconds: of 30 with the first seed and 60 with the second; then of one row.
    ours = np.array([[45, 0.64], [400, 0.55]])
    assert np.asarray(drawn["jeffreys"].get_offsets()) == pytest.approx(ours)
    curves = [np.asarray(line.get_xydata()) for line in panel.lines]
    assert any(np.shape(c) == (2, 2) and np.allclose(c, ours) for c in curves)
    assert np.asarray(drawn["npe_nsf"].get_offsets()) == pytest.approx(
        np.array([[15, 0.67]])
    )
    small, large = drawn["jeffreys"].get_sizes()
    assert small < large
    assert drawn["npe_nsf"].get_sizes() == pytest.approx([small])
    assert "1,000, 10,000 simulations" in panel.get_xlabel()
    assert panel.get_xscale() == "log"


def test_the_plot_of_pairs_shows_the_numbers(results):
    differences = paired_differences(load(results), "jeffreys")
    pairs = summarise_pairs(differences, expected_rows(load(results)))
    figure = plot_paired_differences(differences, pairs, "jeffreys")
    (axes,) = figure.axes
    assert axes.get_title() == "1,000 simulations"
    assert "C2ST of jeffreys − C2ST of the peer" in axes.get_xlabel()
    peers = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(peers) == ["nle", "npe_nsf"]
    # By hand, see the test of the differences; both tasks have the same.
    expected = {"npe_nsf": [-0.04, -0.02], "nle": [0.10, 0.12]}
    found: dict = {}
    for marks in axes.collections:
        for x, y in np.asarray(marks.get_offsets()):
            # Those of a peer are below its place, above the next one's.
            peer = peers[math.floor(y)]
            found.setdefault((marks.get_label(), peer), []).append(x)
    assert {key: sorted(values) for key, values in found.items()} == {
        ("two_moons", "npe_nsf"): pytest.approx(expected["npe_nsf"]),
        ("two_moons", "nle"): pytest.approx(expected["nle"]),
        ("gaussian_mixture", "npe_nsf"): pytest.approx(expected["npe_nsf"]),
    }
    # The means over the tasks that a peer has, with their intervals.
    means, intervals = {}, {}
    for line in axes.lines:
        x, y = (np.asarray(values) for values in line.get_data())
        if line.get_marker() == "o":
            means[peers[int(y[0])]] = x[0]
        elif line.get_color() == "#000000":
            intervals[peers[int(y[0])]] = x
    assert means == pytest.approx({"npe_nsf": -0.03, "nle": 0.11})
    half = 12.706 * 0.01
    assert intervals["nle"] == pytest.approx([0.11 - half, 0.11 + half], abs=1e-4)
    line = pairs.set_index(["peer", "task"]).loc[("npe_nsf", "all tasks")]
    assert intervals["npe_nsf"] == pytest.approx([line["low"], line["high"]])
    # Of nle there is one task of two.
    hollow = {
        peers[int(line.get_ydata()[0])]
        for line in axes.lines
        if line.get_markerfacecolor() == "white"
    }
    assert hollow == {"nle"}


def test_methods_are_told_apart_without_colours():
    names = [*METHODS, *(f"mine_{i}" for i in range(10))]
    styles = _styles(names)
    assert set(styles) == set(names)
    assert len({(s["marker"], s["linestyle"]) for s in styles.values()}) == len(names)


def test_plots_of_another_task_are_without_published_figures(tmp_path):
    write_row(tmp_path, row("mine", "jeffreys", 1000, 1, 1, 0.6))
    rows = load(tmp_path)
    figure = c2st_against_budget(rows, summarise(rows), published())
    assert [part.get_label() for part in figure.axes[0].containers] == ["jeffreys"]


def test_methods_are_in_the_order_of_the_table():
    assert in_order(["zzz", "nle", "jeffreys", "aaa"]) == [
        "jeffreys",
        "nle",
        "aaa",
        "zzz",
    ]
