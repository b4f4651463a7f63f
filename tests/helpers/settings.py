"""The error message of the configuration for impossible settings."""

import pytest

from server.config import ConfigError, load


def refusal(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        load(argv)
    message = str(error.value)
    assert "\n" not in message
    return message
