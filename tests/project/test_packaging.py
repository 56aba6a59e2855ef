"""What a release needs beside code: versions that agree, files that GitHub can read, and checks that can fail."""

import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from tests.tools.release_check import ROOT, check_version, supported_range

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == VERSION
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    assert all(set(author) == {"name"} for author in citation["authors"]) and citation["message"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:300]


@pytest.mark.parametrize("name", ["bug_report", "quality_regression", "feature_request"])
def test_issue_forms(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields and all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_range_of_transformers_holds_what_is_pinned():
    lowest, newest = supported_range(PROJECT)
    (requirement,) = (
        requirement
        for requirement in map(Requirement, PROJECT["project"]["dependencies"])
        if requirement.name == "transformers"
    )
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert all(requirement.specifier.contains(version) for version in (lowest, newest, pinned["transformers"]))


class TestVersion:
    @pytest.mark.parametrize(
        "changelog, here, tags",
        [
            ("## Unreleased\n", [], []),
            ("## Unreleased\n## 0.0.1 - 2026-01-01\n", [], ["v0.0.1"]),
            (f"## [{VERSION}] - 2026-12-01\n", [], []),
            (f"## {VERSION} - 2026-12-01\n", [f"v{VERSION}"], [f"v{VERSION}"]),
        ],
    )
    def test_agrees(self, changelog, here, tags):
        check_version(VERSION, changelog, here, tags)

    @pytest.mark.parametrize(
        "changelog, here, tags, message",
        [
            ("## 9.9.9 - 2026-12-01\n", [], [], "newest entry must be"),
            ("## Unreleased\n", [], [f"v{VERSION}"], "was released from another commit"),
            ("## Unreleased\n", [f"v{VERSION}"], [f"v{VERSION}"], "differ"),
            (f"## {VERSION}\n", [f"v{VERSION}"], [f"v{VERSION}"], "no date"),
            (f"## {VERSION} - 2026-12-01\n", ["v9.9.9"], ["v9.9.9"], "differ"),
        ],
    )
    def test_differs(self, changelog, here, tags, message):
        with pytest.raises(SystemExit, match=message):
            check_version(VERSION, changelog, here, tags)

    def test_this_tree_agrees(self):
        check_version(VERSION, (ROOT / "CHANGELOG.md").read_text(), [], [])


def test_a_range_that_does_not_agree_with_the_dependencies_is_refused():
    project = {**PROJECT, "tool": {"lowrank-cache": {"transformers": ["5.0.0", "5.1.0"]}}}
    with pytest.raises(SystemExit, match="dependencies must hold"):
        supported_range(project)


def test_every_command_explains_itself():
    for script in ("release_check.py", "versions.py"):
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "tools" / script, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0 and "usage" in done.stdout
