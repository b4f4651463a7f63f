"""The documents of settings agree with the code."""

from pathlib import Path

import pytest

from tests.helpers import reference


def test_every_setting_is_in_the_document_as_the_code_has_it() -> None:
    again = "python -m tests.helpers.reference writes it anew"
    assert reference.configuration() == reference.CONFIGURATION.read_text(), again
    assert reference.recipe() == reference.RECIPE.read_text(), again


@pytest.mark.parametrize("document", [reference.CONFIGURATION, reference.RECIPE], ids=lambda path: path.name)
def test_every_setting_has_a_meaning(document: Path) -> None:
    assert [line for line in document.read_text().splitlines() if line.endswith("|  |")] == []
