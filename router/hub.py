"""Models by name on the Hugging Face Hub, as directories in its cache."""

import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from router.errors import UnusableInput

NEEDED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.py",  # code that some models bring along; vLLM loads it only if it is told to
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
)
OF_OTHER_FORMATS = ("consolidated*", "original/*", "onnx/*", "openvino/*", "coreml/*")
"""Files that have the same weights in other formats."""


class NotOnHub(UnusableInput):
    """The hub and its cache give us no model of this name; the message is one line and names it."""


def fetch(
    name: str, cache: Path | None = None, endpoint: str | None = None, *, others: Sequence[str] = ()
) -> Path:
    """The directory of a model, downloaded if necessary. A progress bar appears on a terminal only.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION.
        cache: directory of the cache; None: the hub client's default.
        endpoint: URL of the hub; None: the hub client's default.
        others: patterns of files that are needed in addition to `NEEDED`.

    Raises:
        NotOnHub: the hub has no such model, or cannot be reached and the cache is not enough.
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
            allow_patterns=[*NEEDED, *others],
            ignore_patterns=list(OF_OTHER_FORMATS),
        )
    except Exception as error:  # its HTTP client, the file system and its own checks have errors of their own
        raise NotOnHub(_problem(name, repository, revision, error)) from error
    return Path(directory)


def _problem(name: str, repository: str, revision: str, error: Exception) -> str:
    """One line that says why there is no such model."""
    if isinstance(error, HFValidationError):
        return f"no such directory, and not a name on the hub: {name}"
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
