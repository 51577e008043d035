"""What the documents name exists, and the documents ship with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peelcli import __version__

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "peelcli" / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([\w./-]+\.(?:py|json|yaml)|[\w./-]+/[\w-]+\.md)`")
FROM_ELSEWHERE = {"report.json", "config.json", "baseline.json", "nightly.yaml"}  # a user's files in examples


def _exists(name: str) -> bool:
    if "/" in name:
        return (ROOT / name).exists() or (ROOT / "peelcli" / name).exists()
    return any(ROOT.glob(name)) or any((ROOT / "peelcli").rglob(name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_names_of_files_in_documents_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if not link.startswith(("http:", "https:"))]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = set(CODE.findall(text)) - FROM_ELSEWHERE
    assert sorted(name for name in named if not _exists(name)) == []


def test_a_name_that_does_not_exist_is_noticed() -> None:
    assert not _exists("verdict/behind.py")
    assert not _exists("revive.py")
    assert _exists("verdict/policy.py")


def test_documents_lie_in_the_package_that_the_wheel_holds() -> None:
    assert 'packages = ["peelcli"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"architecture.md", "contributing.md", "families.md", "method.md", "verdicts.md"} <= {
        page.name for page in DOCS.iterdir()
    }


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert found is not None
    assert found[1] == __version__
