"""What is needed to start a gateway, in tests of its settings."""

import os

import pytest
import yaml


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """Starts without a variable of ours; a test sets its own."""
    for name in os.environ:
        if name.startswith("WHEELS_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def needed(tmp_path) -> list[str]:
    """The flags without which nothing starts."""
    (tmp_path / "student").mkdir()
    return ["--student", str(tmp_path / "student"), "--teacher", "http://127.0.0.1:8001"]


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file; returns the flags that name it."""

    def write(content: object) -> list[str]:
        file = tmp_path / "wheels.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return ["--config", str(file)]

    return write
