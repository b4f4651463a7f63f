"""A running gateway, from which training requests completions, and to which it gives new routers."""

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
"""Longest time for one completion, including its wait in the gateway's queue."""
RETRIES = 2
LOOK_SECONDS = 0.5
"""Time between two checks of whether the gateway has loaded a router."""


@dataclass(frozen=True)
class RunningGateway:
    """A gateway behind a URL. Its API key is read from OPENAI_API_KEY."""

    url: str
    """Base URL of the gateway, without /v1."""
    max_tokens: int
    """Longest completion, in tokens."""
    concurrency: int = 16
    """Number of concurrent requests."""
    patience: float = 60.0
    """Longest wait until the gateway has loaded a new router, in seconds."""
    transport: Callable[[], DefaultAsyncHttpxClient] | None = None
    """Makes the HTTP client; None: the default one."""

    def replies(self, sources: Sequence[Source], budget: float) -> list[GatewayReply]:
        """Greedy completions with this budget, in the order of the sources.

        Raises:
            GatewayError: the gateway is away or refuses, or the server is not a gateway.
        """
        return asyncio.run(self._replies(sources, budget))

    def rests(self, begun: Sequence[list[int]], longest: Sequence[int]) -> list[list[int]]:
        """The student's own greedy continuation of each begun completion, as token ids.

        Args:
            begun: the token ids of each prompt and of the tokens written after it.
            longest: most tokens of each continuation, including its end token.

        Raises:
            GatewayError: the gateway is away or refuses, or the server is not a gateway.
        """
        return asyncio.run(self._rests(begun, longest))

    def take(self, router: RouterCheckpoint, directory: Path) -> None:
        """Save a router in the gateway's router directory, and wait until the gateway uses it.

        Raises:
            GatewayError: the gateway does not load the router within `patience` seconds.
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
