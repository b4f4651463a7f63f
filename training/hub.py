"""A trained pair on the Hugging Face hub: the student and its router, each in a repository of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from router.errors import PeerError

PUSHED = ("student", "router")


class HubError(PeerError):
    """The hub cannot be reached, or does not let us write; the message says why."""


def check_hub(name: str, api: HfApi) -> None:
    """Before training: the name is one, and the hub knows who we are.

    Raises:
        HubError: it would fail at the end.
    """
    if name.count("/") != 1:
        raise HubError(f"--push-to-hub {name}: want OWNER/NAME")
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
