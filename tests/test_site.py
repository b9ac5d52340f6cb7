"""The pages as a site: every page is in it, links between pages lead somewhere, and Sphinx has nothing to warn of."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def anchors(text):
    """Of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.is_file(), target
        assert not anchor or anchor in anchors(other.read_text()), target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = re.findall(r"^(\w+)$", "".join(re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL)), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}


def test_the_rooms_of_the_interface_are_rooms():
    named = re.findall(r"automodule:: dreamprm_jax\.(\S+)", (ROOT / "docs" / "api.md").read_text())
    assert len(named) == len(set(named)) > 10
    for name in named:
        assert (ROOT / "dreamprm_jax" / f"{name.replace('.', '/')}.py").is_file(), name


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")),
    reason="Sphinx: requirements-docs.txt",
)
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api.html").read_text()
    for name in ("prm.PRM.extend_many", "hypergradient.dot", "weighting.Weighting", "selection.outcomes"):
        assert f'id="dreamprm_jax.{name}"' in page, name
    assert "Alias for field number" not in page
    assert 'href="data.html"' in (tmp_path / "site" / "index.html").read_text()
