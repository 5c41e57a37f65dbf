"""Build the wheel and try it in empty environments: `make release-check`.

    python tests/release_check.py
    python tests/release_check.py --torch 2.4.1 2.13.0 --python python3.10 python3.12

For every Python that is found, on the path or with pyenv, every torch that is asked
for, and the oldest and the newest of the other requirements: an empty environment, the
wheel, a short training in it. Versions come from where pip is configured to look. The
torch is, if not told otherwise, the oldest that the package is said to work with, and
that of this environment. A build without CUDA is a tenth of the size: set
PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to where such builds are. For a Python without
that torch the package is compiled only, and said not to be tried.

The exit status is 0 if nothing failed and the oldest or the newest Python of those that
setup.cfg names was tried.
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
# Those that setup.cfg names, and later ones, which may work.
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

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
from sbi_jeffreys.plots import plot_c2st, plot_corner, plot_densities, plot_training

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
score = c2st(samples["direct"], samples["refined"])
assert 0 <= score <= 1
plot_c2st({"refined": {200: [float(score)] * 2}})
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


def lower_bounds() -> dict[str, str]:
    """Return the oldest version of every requirement that has one."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    pairs = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in lines]
    return {m[1]: m[2] for m in pairs if m}


def oldest_requirements() -> list[str]:
    """Return the lower bounds of the requirements but torch, as exact versions."""
    bounds = lower_bounds()
    return [f"{name}=={bounds[name]}" for name in bounds if name != "torch"]


def default_torches() -> list[str]:
    """Return the oldest supported torch and the installed one."""
    # Without "+cpu": pip takes such a build where there is one for the Python.
    installed = version("torch").split("+")[0]
    return list(dict.fromkeys([lower_bounds()["torch"], installed]))


def supported_pythons() -> list[str]:
    """Return the Pythons that setup.cfg names, from the oldest on."""
    text = (ROOT / "setup.cfg").read_text()
    return re.findall(r"Python :: (3\.\d+)$", text, re.MULTILINE)


def version_of(python: str) -> str | None:
    """Return an interpreter's version such as 3.12, None if it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return None if result.returncode else result.stdout.strip()


def find_python(wanted: str) -> str | None:
    """Return an interpreter of a version such as 3.12 that runs, None without one.

    What is on the path may be a shim of pyenv that fails, where another version is
    chosen: the interpreters behind the shims are tried as well.
    """
    candidates = [shutil.which(f"python{wanted}")]
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True)
        versions = Path(root.stdout.strip()) / "versions"
        candidates += sorted(map(str, versions.glob(f"{wanted}.*/bin/python")))
    running = (c for c in candidates if c is not None and version_of(c) == wanted)
    return next(running, None)


def found_pythons() -> list[str]:
    """Return this Python and those of other versions that are found."""
    this = version_of(sys.executable)
    pythons = [sys.executable]
    for wanted in PYTHONS:
        if wanted == this:
            continue
        python = find_python(wanted)
        if python is None:
            print(f"Python {wanted}: none that runs on this machine.")
        else:
            pythons.append(python)
    return pythons


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


def verdict(outcomes: list[tuple[str | None, str]]) -> int:
    """Return the exit status for outcomes by the version of Python, and say why."""
    tried = {v for v, outcome in outcomes if not outcome.startswith("not tried")}
    supported = supported_pythons()
    ends = supported[0], supported[-1]
    if not tried.intersection(ends):
        print(f"Neither Python {ends[0]} nor {ends[1]} was tried.")
        return 1
    return int(any(outcome.startswith("FAILED") for _, outcome in outcomes))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", help="default: all that are found")
    parser.add_argument(
        "--torch",
        nargs="+",
        default=default_torches(),
        help="default: the oldest supported and the installed one",
    )
    options = parser.parse_args(arguments)
    pythons = options.python or found_pythons()
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build_wheel(Path(temporary))
        check_contents(wheel)
        print(f"{wheel.name}: the package and nothing else.", flush=True)
        for python in pythons:
            number = version_of(python)
            for torch in options.torch:
                for label, others in (
                    ("newest", []),
                    ("oldest", oldest_requirements()),
                ):
                    with tempfile.TemporaryDirectory() as folder:
                        outcome = (
                            "not tried: it does not run"
                            if number is None
                            else try_environment(
                                python, wheel, torch, others, Path(folder)
                            )
                        )
                    outcomes.append((number, outcome))
                    what = f"Python {number or python}, torch {torch}, {label}"
                    print(f"{what} requirements: {outcome}", flush=True)
    return verdict(outcomes)


if __name__ == "__main__":
    sys.exit(main())
