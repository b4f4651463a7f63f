"""Downloads models from the Hugging Face hub, and uploads a trained pair to it.

Student and router get a repository each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from router.errors import PeerError
from router.hub import fetch

PUSHED = ("student", "router")
OLDER_WEIGHTS = ("*.bin",)
"""Weight files of a model without safetensors. It can be trained, and its export has safetensors."""


class HubError(PeerError):
    """The hub cannot be reached, or does not let this user write; the message says why."""


def directory_of(name: str) -> Path:
    """The local directory of a model; files that are not in the hub's cache are downloaded.

    Args:
        name: a directory, or a hub name: OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        NotOnHub: there is no such model, or the hub cannot be reached and the local cache is not enough.
    """
    return Path(name).resolve() if Path(name).is_dir() else _fetched(name)


@cache
def _fetched(name: str) -> Path:
    """The downloaded directory of a hub name, cached so that one run uses one version of a model."""
    directory = fetch(name)
    if any(directory.glob("*.safetensors")):
        return directory
    return fetch(name, others=OLDER_WEIGHTS)


def check_hub(name: str, api: HfApi) -> None:
    """Check, before training, that the repository names are valid and that the user is logged in.

    Raises:
        HubError: the upload at the end would fail.
    """
    if name.count("/") != 1:
        raise HubError(f"--push-to-hub {name}: expected OWNER/NAME")
    with _explained(name):
        for part in PUSHED:
            validate_repo_id(f"{name}-{part}")
        api.whoami()


def push(output: Path, name: str, api: HfApi) -> list[str]:
    """Upload the exports to OWNER/NAME-student and OWNER/NAME-router; new repositories are private.

    Returns:
        The names of the repositories.

    Raises:
        HubError: nothing was exported yet, or the hub refuses the upload.
    """
    pushed = []
    for part in PUSHED:
        if not (output / part).is_dir():
            continue
        repository = f"{name}-{part}"
        with _explained(repository):
            api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=output / part)
        pushed.append(repository)
    if not pushed:
        raise HubError(f"--push-to-hub {name}: neither a student nor a router in {output}")
    return pushed


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn any error in the block into a HubError; the hub's client raises those of several libraries."""
    try:
        yield
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise HubError(f"--push-to-hub {name}: {first}") from error
