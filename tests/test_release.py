"""What is released: a wheel of the package and nothing else, and its papers."""

import re
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from sbi_jeffreys import __version__
from tests import release_check
from tests.release_check import build_wheel, check_contents, oldest_requirements

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    check_contents(wheel)


@pytest.mark.slow
def test_the_check_of_the_contents_finds_what_is_too_much(wheel, tmp_path):
    more = tmp_path / wheel.name
    more.write_bytes(wheel.read_bytes())
    with zipfile.ZipFile(more, "a") as file:
        file.writestr("tests/__init__.py", "")
    with pytest.raises(AssertionError, match="tests/__init__.py"):
        check_contents(more)


@pytest.mark.slow
def test_the_metadata_is_that_of_the_repository(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith("/METADATA"))
        metadata = Parser().parsestr(file.read(name).decode())
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "sbi" in metadata["Summary"] and "JeffreysNPE" in metadata.get_payload()
    required = metadata.get_all("Requires-Dist") or []
    assert any(re.match(r"sbi<0\.28,>=0\.27|sbi>=0\.27,<0\.28", r) for r in required)


def test_oldest_requirements_are_the_lower_bounds():
    oldest = dict(line.split("==") for line in oldest_requirements())
    assert oldest["sbi"] == "0.27" and "torch" not in oldest
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for name, bound in oldest.items():
        assert f"{name}>={bound}" in config["options"]["install_requires"]


def test_changelog_and_citation_know_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    headings = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    # The version under way, or one that was released.
    assert headings[0] == "Unreleased" or headings[0] == __version__


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_shim_that_fails_is_no_python(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release_check.find_python("3.10") is None  # nothing there
    shim = script(tmp_path / "python3.10", "echo 'no such version' >&2; exit 127")
    assert release_check.version_of(shim) is None
    assert release_check.find_python("3.10") is None
    script(tmp_path / "pyenv", f"echo {tmp_path}/root")
    assert release_check.find_python("3.10") is None  # pyenv has none, either
    versions = tmp_path / "root/versions"
    script(versions / "3.10.2/bin/python", "exit 1")
    real = script(versions / "3.10.9/bin/python", "echo 3.10")
    script(versions / "3.11.9/bin/python", "echo 3.11")
    assert release_check.find_python("3.10") == real
    # One on the path that runs comes first, unless it is another version.
    script(tmp_path / "python3.10", "echo 3.10")
    assert release_check.find_python("3.10") == shim
    script(tmp_path / "python3.10", "echo 3.9")
    assert release_check.find_python("3.10") == real


@pytest.mark.slow
def test_the_oldest_and_the_installed_torch_are_tried(wheel, monkeypatch, capsys):
    tried = []

    def try_environment(python, wheel, torch, others, folder):
        tried.append((torch, bool(others)))
        return "passed: trained"

    monkeypatch.setattr(release_check, "try_environment", try_environment)
    monkeypatch.setattr(release_check, "build_wheel", lambda folder: wheel)
    monkeypatch.setattr(release_check, "version_of", lambda python: "3.10")
    assert release_check.main(["--python", "python3.10"]) == 0
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    (oldest,) = re.findall(r"torch>=([\d.]+)", config["options"]["install_requires"])
    installed = version("torch").split("+")[0]
    assert tried == [(t, old) for t in (oldest, installed) for old in (False, True)]
    assert f"Python 3.10, torch {oldest}, oldest" in capsys.readouterr().out


def test_the_release_check_fails_without_the_ends_of_what_is_supported(capsys):
    supported = release_check.supported_pythons()
    assert supported[0] == "3.10" and len(supported) > 2
    passed, skipped = "passed: trained", "not tried, but compiled: no torch"
    between = [(number, passed) for number in supported[1:-1]]
    assert release_check.verdict(between) == 1
    assert release_check.verdict([*between, ("3.10", skipped)]) == 1
    assert f"Neither Python 3.10 nor {supported[-1]}" in capsys.readouterr().out
    for end in (supported[0], supported[-1]):
        assert release_check.verdict([*between, (end, passed)]) == 0
        assert release_check.verdict([(end, passed), (end, "FAILED: x")]) == 1
    assert release_check.verdict([(None, "not tried: it does not run")]) == 1
