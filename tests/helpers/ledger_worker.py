"""The reservations of one gateway, in a process of its own.

    python -m tests.helpers.ledger_worker URL SEED

Settles one reservation, and waits for the end of its standard input. Then it goes on with many streams at
once. So no process spends the budget before another one has started. Prints a line after every settlement
with the number of settled tokens, or "-" for a refusal.
"""

import asyncio
import random
import sys

from router.ledger import Denial, Scope, TokensPerWindow
from router.ledger.redis import RedisLedger

LEASE_SECONDS = 3.0
WINDOW_SECONDS = 3600.0
STREAMS = 50
TENANT = Scope("tenant", "acme", TokensPerWindow(tokens=20_000, window_seconds=WINDOW_SECONDS))
EVERYBODY = Scope("global", "", TokensPerWindow(tokens=12_000, window_seconds=WINDOW_SECONDS))


async def call(ledger: RedisLedger, rng: random.Random) -> bool:
    """Reserve, write for a while, settle; returns whether the tokens were settled."""
    reply = await ledger.reserve([TENANT, EVERYBODY], rng.randint(1, 8), at_least=1)
    if isinstance(reply, Denial):
        if reply.reason != "unavailable":
            print("-", flush=True)
            await asyncio.sleep(0.2)  # a dead process may still hold the rest
        return False
    await asyncio.sleep(rng.uniform(0.0, 0.02))
    used = rng.randint(0, reply.tokens)
    if await ledger.settle(reply, used) != "settled":
        return False
    print(used, flush=True)
    return True


async def stream(ledger: RedisLedger, rng: random.Random) -> None:
    """Call again and again, also when nothing is left."""
    while True:
        await call(ledger, rng)


async def main(url: str, seed: int) -> None:
    ledger = RedisLedger.connect(url, lease_seconds=LEASE_SECONDS, timeout=20.0)
    rng = random.Random(seed)
    while not await call(ledger, rng):
        pass
    sys.stdin.read()
    async with asyncio.TaskGroup() as group:
        for _ in range(STREAMS):
            group.create_task(stream(ledger, rng))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
