"""The site builds without a warning, and says what the code and the report say."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import sbi_jeffreys

ROOT = Path(__file__).resolve().parents[1]

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


def test_the_figures_are_those_of_the_report(site):
    path = ROOT / "tasks/reports/against_npe_1000/c2st.csv"
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "measured"]
    benchmark = (site / "benchmarks.html").read_text()
    c2st = {(row["task"], row["method"]): float(row["mean"]) for row in rows}
    for value in c2st.values():
        assert f"{value:.3f}" in benchmark
    # A loss is shown wherever there is one.
    losses = (site / "when_not_to_use.html").read_text()
    num = sum(
        value > c2st[task, peer]
        for (task, method), value in c2st.items()
        for peer in ("npe_maf", "npe_nsf")
        if method.startswith("jeffreys")
    )
    assert losses.count("<tr") == num + 1


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
