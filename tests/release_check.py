"""Build the wheel and try it in empty environments: `make release-check`.

    python tests/release_check.py
    python tests/release_check.py --torch 2.3.1 2.13.0 --python python3.10 python3.12

For every Python that is found, every torch that is asked for, and the oldest and the
newest of the other requirements: an empty environment, the wheel, a short training in
it. Versions come from where pip is configured to look. The torch is, if not told
otherwise, that of this environment: where it is a build without CUDA, a tenth of the
size, no other is fetched; set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to where such
builds are. For a Python without one the package is compiled only, and said not to be
tried.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")

# What a user does first, and what breaks first with other versions.
SMOKE = """
import importlib.util, pathlib, sys, warnings
warnings.simplefilter("ignore")
import matplotlib
matplotlib.use("Agg")
import torch
from sbi.utils import BoxUniform
import sbi_jeffreys
from sbi_jeffreys import JeffreysNPE, NoTracker, check_fit
from sbi_jeffreys.metrics import c2st
from sbi_jeffreys.plots import plot_corner, plot_densities, plot_training

assert pathlib.Path(sbi_jeffreys.__file__).is_relative_to(sys.prefix)
assert not any(importlib.util.find_spec(name) for name in ("tasks", "tests"))
torch.set_num_threads(1)
torch.manual_seed(0)
prior = BoxUniform(-torch.ones(2), torch.ones(2))
theta = prior.sample((200,))
x = theta + 0.3 * torch.randn_like(theta)
inference = JeffreysNPE(prior, tracker=NoTracker(), show_progress_bars=False)
inference.append_simulations(theta, x).train(max_num_epochs=6)
inference.save("smoke.pt")
inference = JeffreysNPE(prior, tracker=NoTracker()).load("smoke.pt")
samples = {}
for name in ("direct", "refined"):
    posterior = inference.build_posterior(sample_with=name)
    samples[name] = posterior.sample((100,), x=x[:1], show_progress_bars=False)
    assert samples[name].shape == (100, 2)
    assert posterior.log_prob(samples[name], x=x[:1]).isfinite().all()
check_fit(inference, x[:1])
plot_training(inference.summary)
plot_densities(posterior, x[:1], resolution=20)
plot_corner(samples, bins=20)
assert 0 <= c2st(samples["direct"], samples["refined"]) <= 1
print("trained with torch", torch.__version__)
"""


def build_wheel(folder: Path) -> Path:
    """Build the wheel into a folder, from a copy of the sources.

    What earlier builds left in the repository would else be packed again.
    """
    sources = folder / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("sbi_jeffreys", "tasks", "tests"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    # The setuptools that is here, so that nothing is fetched.
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(sources)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Raise unless the wheel holds the package, its metadata, and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"sbi_jeffreys/{p.name}" for p in (ROOT / "sbi_jeffreys").glob("*.py")}
    needed = modules | {"sbi_jeffreys/py.typed"}
    metadata = {
        name for name in names if re.match(r"sbi_jeffreys-[^/]*\.dist-info/", name)
    }
    assert names - metadata == needed, sorted((names - metadata) ^ needed)
    assert any(name.endswith("LICENSE") for name in metadata), sorted(metadata)


def oldest_requirements() -> list[str]:
    """Return the lower bounds of the requirements, as exact versions."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    pairs = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in lines]
    return [f"{m[1]}=={m[2]}" for m in pairs if m and m[1] != "torch"]


def found_pythons() -> list[str]:
    """Return this Python and those of other versions that are found."""
    this = f"python{sys.version_info.major}.{sys.version_info.minor}"
    others = [name for name in PYTHONS if name != this]
    for name in others:
        if not shutil.which(name):
            print(f"{name}: not on this machine.")
    return [sys.executable, *filter(shutil.which, others)]


def try_environment(
    python: str, wheel: Path, torch: str, others: list[str], folder: Path
) -> str:
    """Install the wheel into an empty environment and train there.

    Returns:
        What came of it: "passed ...", "not tried ..." or "FAILED ...".
    """
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")
    }
    environment = folder / "environment"
    binary = environment / "bin/python"

    def run(*command: object) -> subprocess.CompletedProcess:
        words = [str(word) for word in command]
        return subprocess.run(
            words, cwd=folder, env=clean, capture_output=True, text=True
        )

    def last_line(result: subprocess.CompletedProcess) -> str:
        return (result.stderr.strip() or result.stdout.strip() or "?").splitlines()[-1]

    made = run(python, "-m", "venv", environment)
    if made.returncode:
        return f"not tried: {last_line(made)}"
    install = (binary, "-m", "pip", "install", "--quiet")
    there = run(*install, f"torch=={torch}")
    if there.returncode:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder / "package")
        compiled = run(binary, "-W", "error", "-m", "compileall", "-q", "package")
        if compiled.returncode:
            return f"FAILED to compile: {last_line(compiled)}"
        return f"not tried, but compiled: {last_line(there)}"
    installed = run(*install, wheel, f"torch=={torch}", *others)
    if installed.returncode:
        return f"FAILED to install: {last_line(installed)}"
    smoke = run(binary, "-I", "-c", SMOKE)
    if smoke.returncode:
        return f"FAILED: {last_line(smoke)}"
    return f"passed: {smoke.stdout.strip().splitlines()[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", help="default: all that are found")
    parser.add_argument("--torch", nargs="+", default=[version("torch")])
    options = parser.parse_args()
    pythons = options.python or found_pythons()
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build_wheel(Path(temporary))
        check_contents(wheel)
        print(f"{wheel.name}: the package and nothing else.", flush=True)
        for python in pythons:
            for torch in options.torch:
                for label, others in (
                    ("newest", []),
                    ("oldest", oldest_requirements()),
                ):
                    with tempfile.TemporaryDirectory() as folder:
                        outcome = try_environment(
                            python, wheel, torch, others, Path(folder)
                        )
                    outcomes.append(outcome)
                    what = f"{python}, torch {torch}, {label} requirements"
                    print(f"{what}: {outcome}", flush=True)
    if not any(outcome.startswith("passed") for outcome in outcomes):
        print("Nothing passed.")
        return 1
    return int(any(outcome.startswith("FAILED") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
