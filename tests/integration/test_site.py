"""The site that is built from the documents."""

from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.helpers.paths import ROOT

# MkDocs and its plugins use deprecated parts of the standard library.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_site_builds_without_a_broken_link(tmp_path) -> None:
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    assert config.strict
    build(config)  # in strict mode a warning ends the build
    docs = ROOT / "docs"
    pages = {page.relative_to(tmp_path) for page in tmp_path.rglob("*.html")} - {Path("404.html")}
    assert pages == {document.relative_to(docs).with_suffix(".html") for document in docs.rglob("*.md")}
