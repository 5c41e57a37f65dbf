"""What is released: a wheel of the package and nothing else, and its papers."""

import re
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from sbi_jeffreys import __version__
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
    for name, version in oldest.items():
        assert f"{name}>={version}" in config["options"]["install_requires"]


def test_changelog_and_citation_know_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    headings = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    # The version under way, or one that was released.
    assert headings[0] == "Unreleased" or headings[0] == __version__
