"""Models and routers by their names on the Hugging Face hub, as directories of its cache."""

import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from server.config import ConfigError, ServeConfig

NEEDED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.py",  # of models with code of their own, which vLLM loads only if it is told to
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
)
OF_OTHER_FORMATS = ("consolidated*", "original/*", "onnx/*", "openvino/*", "coreml/*")
"""The same weights once more."""


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
            except ConfigError as error:
                raise ConfigError(f"{setting}: {error}") from error
    return config.model_copy(update=found)


def fetch(name: str, cache: Path | None = None, endpoint: str | None = None) -> Path:
    """The directory of a model, downloaded if need be, with a progress bar on a terminal only.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION.
        cache: default: the hub's own.
        endpoint: default: the hub's own.

    Raises:
        ConfigError: see `with_directories`.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    repository, _, revision = name.partition("@")
    try:
        directory = snapshot_download(
            repository,
            revision=revision or None,
            cache_dir=cache,
            endpoint=endpoint,
            allow_patterns=list(NEEDED),
            ignore_patterns=list(OF_OTHER_FORMATS),
        )
    except Exception as error:  # its HTTP client, the file system and its own checks have errors of their own
        raise ConfigError(_problem(name, repository, revision, error)) from error
    return Path(directory)


def _problem(name: str, repository: str, revision: str, error: Exception) -> str:
    """One line that says why there is no such model."""
    if isinstance(error, GatedRepoError):
        return f"{name}: access has to be asked for on the hub; then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such directory, and the hub has no model {repository} (a private one needs HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision} on the hub"
    if isinstance(error, LocalEntryNotFoundError | IncompleteSnapshotError | OfflineModeIsEnabled):
        return f"no such directory: {name}; it is not in the hub's cache, and the hub cannot be reached"
    lines = str(error).splitlines() or [type(error).__name__]
    return f"{name} cannot be fetched from the hub: {lines[0]}"
