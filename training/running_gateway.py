"""A running gateway: training requests completions from it, and gives it new routers."""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from openai import DefaultAsyncHttpxClient

from measuring.chats import Source
from measuring.gateway import GatewayClient, GatewayError, GatewayReply
from router.checkpoint import RouterCheckpoint

SECONDS = 300.0
"""For one completion, however long the gateway lets it wait."""
RETRIES = 2
LOOK_SECONDS = 0.5
"""Between two looks whether a router was taken."""


@dataclass(frozen=True)
class RunningGateway:
    """A gateway behind a URL. Its key is taken from OPENAI_API_KEY."""

    url: str
    """Without /v1."""
    max_tokens: int
    """Longest completion."""
    concurrency: int = 16
    """Requests at once."""
    patience: float = 60.0
    """Seconds in which it has to take a router."""
    transport: Callable[[], DefaultAsyncHttpxClient] | None = None
    """Makes an HTTP client in place of its own."""

    def replies(self, sources: Sequence[Source], budget: float) -> list[GatewayReply]:
        """Greedy, in the order of the sources.

        Raises:
            GatewayError: the gateway is away, refuses, or is none.
        """
        return asyncio.run(self._replies(sources, budget))

    def rests(self, begun: Sequence[list[int]], longest: Sequence[int]) -> list[list[int]]:
        """What the student alone writes after each of these token ids, greedily.

        Args:
            begun: token ids of prompts and what was written after them.
            longest: tokens of each rest, its end token with it.

        Raises:
            GatewayError: the gateway is away, refuses, or is none.
        """
        return asyncio.run(self._rests(begun, longest))

    def take(self, router: RouterCheckpoint, directory: Path) -> None:
        """Put a router into the directory that the gateway serves with, and wait until it is in use.

        Raises:
            GatewayError: the gateway does not take it.
        """
        router.save(directory)
        asyncio.run(self._until_taken(router.digest(), directory))

    async def _replies(self, sources: Sequence[Source], budget: float) -> list[GatewayReply]:
        async with self._client() as client:
            return await client.ask_all(sources, budget)

    async def _rests(self, begun: Sequence[list[int]], longest: Sequence[int]) -> list[list[int]]:
        async with self._client() as client:
            return await client.write_all(begun, longest)

    async def _until_taken(self, digest: str, directory: Path) -> None:
        deadline = monotonic() + self.patience
        async with self._client() as client:
            while (await client.prices()).router != digest:
                if monotonic() >= deadline:
                    raise GatewayError(
                        f"the gateway at {self.url} does not load the router in {directory}: start it with "
                        f"--router {directory}; if you did, its log has the reason"
                    )
                await asyncio.sleep(LOOK_SECONDS)

    def _client(self) -> GatewayClient:
        return GatewayClient(
            self.url,
            concurrency=self.concurrency,
            max_tokens=self.max_tokens,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=SECONDS,
            retries=RETRIES,
            transport=self.transport() if self.transport is not None else None,
        )
