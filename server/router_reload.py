"""Replaces the running router without a restart."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from router.checkpoint import CONFIG_FILE, CheckpointError, RouterCheckpoint
from router.reserved import ReservedRows
from server.file_state import FileState

logger = logging.getLogger(__name__)


async def load_everywhere(
    call: Callable[..., Awaitable[Sequence[Any]]], directory: Path, router: RouterCheckpoint, gate: str
) -> None:
    """Put a router into every process of the engine, or into none.

    ``call``: vLLM's ``collective_rpc``; ``gate``: name of the gate that decides from now on.

    Raises:
        CheckpointError: the directory has another router by now.
    """
    digests = set(await call("prepare_router", args=(str(directory),)))
    if digests != {router.digest()}:
        raise CheckpointError("it was replaced while the gateway read it; the new one is read next")
    await call("load_router", args=(str(directory), gate))


class RouterReload:
    """Watches a router checkpoint's directory, and loads it whenever it changes.

    It looks at `router.json`, which `RouterCheckpoint.save` writes last. The directory may also be replaced
    by another one, or be a symbolic link that is changed.
    """

    def __init__(
        self,
        directory: Path,
        student: Path,
        running: RouterCheckpoint | None,
        reserved: ReservedRows,
        use: Callable[[RouterCheckpoint], Awaitable[None]],
    ) -> None:
        """Prepare the watch.

        Args:
            directory: the router's directory.
            student: the student's checkpoint.
            running: the router in use; None if the directory is still empty.
            reserved: reserved rows of the running student.
            use: puts a new router into the engine and the policy.
        """
        self._file = directory / CONFIG_FILE
        self._student = student
        self._running = running
        self._reserved = reserved
        self._use = use
        self._seen: FileState | None = None  # a change during the gateway's start counts too

    async def watch(self, seconds: float = 2.0) -> None:
        """Look every ``seconds`` seconds, forever; an unusable router is logged and changes nothing."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.reload()
            except CheckpointError as error:
                logger.error("the router was not replaced: %s", error)
            except Exception:  # for example in the engine's process: the next checkpoint may work
                logger.exception("the router could not be replaced")

    async def reload(self) -> bool:
        """Load the router if it has changed; returns whether a new one is in use now.

        Raises:
            CheckpointError: the new router cannot be used; the old one stays in use.
        """
        seen = await asyncio.to_thread(self._stat)
        if seen is None or seen == self._seen:
            return False
        self._seen = seen
        router = await asyncio.to_thread(self._load)
        if self._running is not None and router.digest() == self._running.digest():
            return False
        await self._use(router)
        logger.info("router reloaded: %s", router.digest()[:12])
        self._running = router
        return True

    def _load(self) -> RouterCheckpoint:
        router = RouterCheckpoint.load(self._file.parent)
        router.check_student(self._student)
        if router.reserved != self._reserved:
            raise CheckpointError("its reserved rows differ from those of the running student")
        return router

    def _stat(self) -> FileState | None:
        try:
            return FileState.of(self._file)
        except OSError:
            return None
