"""Downloads the configured student and router if they are names on the Hugging Face Hub."""

from pathlib import Path

from router.hub import NotOnHub, fetch
from server.config import ConfigError, ServeConfig


def with_directories(config: ServeConfig) -> ServeConfig:
    """The configuration with a directory in place of every hub name; downloads what is not in the cache.

    Raises:
        ConfigError: a name is not on the hub, or the hub cannot be reached and the cache is not enough.
    """
    found: dict[str, Path] = {}
    for setting in ("student", "router"):
        path: Path | None = getattr(config, setting)
        if path is not None and not path.is_dir():
            try:
                found[setting] = fetch(str(path))
            except NotOnHub as error:
                raise ConfigError(f"{setting}: {error}") from error
    return config.model_copy(update=found)
