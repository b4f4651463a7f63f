"""Models from the Hugging Face hub, and the trained pair on it.

Student and router have a repository each.
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
"""Files of a model that has no safetensors: it can be trained, and its export has them."""


class HubError(PeerError):
    """The hub cannot be reached, or does not let us write; the message says why."""


def directory_of(name: str) -> Path:
    """Of a directory or hub name, OWNER/NAME or OWNER/NAME@REVISION; downloads what is not in the cache.

    Raises:
        NotOnHub: there is no such model, or the hub cannot be reached and its cache is not enough.
    """
    return Path(name).resolve() if Path(name).is_dir() else _fetched(name)


@cache
def _fetched(name: str) -> Path:
    """One run works with one version of a model."""
    directory = fetch(name)
    if any(directory.glob("*.safetensors")):
        return directory
    return fetch(name, others=OLDER_WEIGHTS)


def check_hub(name: str, api: HfApi) -> None:
    """Before training: the name is one, and the hub knows who we are.

    Raises:
        HubError: it would fail at the end.
    """
    if name.count("/") != 1:
        raise HubError(f"--push-to-hub {name}: expected OWNER/NAME")
    with _explained(name):
        for part in PUSHED:
            validate_repo_id(f"{name}-{part}")
        api.whoami()


def push(output: Path, name: str, api: HfApi) -> list[str]:
    """Upload the exports to OWNER/NAME-student and OWNER/NAME-router, private if they are new.

    Returns:
        Names of the repositories.

    Raises:
        HubError: nothing was exported yet, or the hub refuses.
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
    """The hub's client raises errors of several HTTP libraries: all of them end here."""
    try:
        yield
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise HubError(f"--push-to-hub {name}: {first}") from error
