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

    ``call``: vLLM's ``collective_rpc``; ``gate``: the one that decides from now on.

    Raises:
        CheckpointError: the directory's router is another one by now.
    """
    digests = set(await call("prepare_router", args=(str(directory),)))
    if digests != {router.digest()}:
        raise CheckpointError("it was replaced while the gateway read it; the new one is read next")
    await call("load_router", args=(str(directory), gate))


class RouterReload:
    """Watches a router checkpoint's directory, and loads it whenever it changes.

    `router.json` is looked at, which `RouterCheckpoint.save` writes last; a directory is also replaced by
    another in its place, or by turning a symbolic link.
    """

    def __init__(
        self,
        directory: Path,
        student: Path,
        running: RouterCheckpoint | None,
        reserved: ReservedRows,
        use: Callable[[RouterCheckpoint], Awaitable[None]],
    ) -> None:
        """``use`` puts a checkpoint for this student into the engine and the policy.

        ``running``: None where the directory is empty so far; ``reserved``: the running student's.
        """
        self._file = directory / CONFIG_FILE
        self._student = student
        self._running = running
        self._reserved = reserved
        self._use = use
        self._seen: FileState | None = None  # what came while the gateway started is taken too

    async def watch(self, seconds: float = 2.0) -> None:
        """Look every so often, for ever; an unusable router is logged and changes nothing."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.reload()
            except CheckpointError as error:
                logger.error("the router was not replaced: %s", error)
            except Exception:  # from the engine's process, say: the next checkpoint may do
                logger.exception("the router could not be replaced")

    async def reload(self) -> bool:
        """Whether there was another router, which is in use now.

        Raises:
            CheckpointError: it cannot take the place of the one that runs, which goes on.
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
