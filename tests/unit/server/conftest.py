"""Settings, variables and files for tests that configure a gateway."""

import os

import pytest
import yaml


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """An environment without our variables, in which a test sets its own."""
    for name in os.environ:
        if name.startswith("WHEELS_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def needed(tmp_path) -> list[str]:
    """The flags that a gateway needs to start."""
    (tmp_path / "student").mkdir()
    return ["--student", str(tmp_path / "student"), "--teacher", "http://127.0.0.1:8001"]


@pytest.fixture
def write(tmp_path):
    """A function that writes a configuration file and returns the flags that name it."""

    def write(content: object) -> list[str]:
        file = tmp_path / "wheels.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return ["--config", str(file)]

    return write
