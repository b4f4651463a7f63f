"""Finds the prices of a running gateway from prompts: sends them at each rate until it is realised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from measuring.chats import Source
from measuring.gateway import GatewayClient, GatewayPrices, GatewayReply
from router.errors import UnusableInput
from router.policy import Calibration

SHARED_LIMITS = ("tenant_", "global_", "unavailable")
"""Beginnings of the reasons for which shared limits refuse a span."""
LEARNING_PASSES = 1
"""Passes that only teach the gateway: their rates do not count, because the prices still change."""


class NothingToLearn(UnusableInput):
    """The gateway's prices cannot be found from prompts; the message says why."""


@dataclass(frozen=True)
class RatePass:
    """One pass over the prompts at one rate."""

    asked: float
    passes: int
    """Number of passes at this rate, including this one."""
    teacher_tokens: int
    completion_tokens: int
    degraded: int
    """Number of requests that lost their teacher."""
    limited: int
    """Number of requests to which a shared limit refused a span."""

    @classmethod
    def of(cls, asked: float, passes: int, replies: Sequence[GatewayReply]) -> "RatePass":
        """The sums over all replies of a pass.

        Raises:
            NothingToLearn: the key's maximum was less than the rate.
        """
        if any(reply.clamped for reply in replies):
            raise NothingToLearn(f"--rates: {asked:g} is above the maximum_budget of the API key")
        limited = 0
        for reply in replies:
            limited += any(reason.startswith(SHARED_LIMITS) for reason in reply.denied)
        return cls(
            asked=asked,
            passes=passes,
            teacher_tokens=sum(reply.teacher_tokens for reply in replies),
            completion_tokens=sum(len(reply.token_ids) for reply in replies),
            degraded=sum(reply.degraded for reply in replies),
            limited=limited,
        )

    @property
    def rate(self) -> float:
        """Teacher tokens per completion token."""
        return self.teacher_tokens / self.completion_tokens

    def is_near(self, tolerance: float) -> bool:
        """Whether the rate is the one that was asked for, give or take the tolerance."""
        return abs(self.rate - self.asked) <= tolerance


@dataclass
class RateFinder:
    """Asks a gateway at several rates, until it realises them."""

    client: GatewayClient
    prompts: Sequence[Source]
    passes: int
    """Most passes over the prompts for each rate."""
    tolerance: float
    start: Callable[[float, int], Callable[[], None]] = lambda rate, number: lambda: None
    """Called before each pass with its rate and number; what it returns is called after each reply."""
    last: dict[float, RatePass] = field(default_factory=dict)
    """The last pass at each rate, by the rate that was asked for."""
    prices: GatewayPrices | None = None
    """The gateway's prices after the last pass; None before the first."""

    async def find(self, rates: Sequence[float]) -> None:
        """Teach the gateway these rates.

        Raises:
            GatewayError: a request failed.
            NothingToLearn: the gateway does not learn, or the key may not ask for a rate this high.
        """
        self.prices = await self.client.prices()
        if not self.prices.learned:
            raise NothingToLearn(
                "the gateway's prices are not learned: they were measured with its router, are fixed by "
                "--price, or belong to the random gate; `wheels evaluate --gateway` shows what they realise"
            )
        waiting = list(rates)
        for number in range(1, self.passes + 1):
            for rate in waiting:
                await self._ask(rate, number)
            if number > LEARNING_PASSES:
                waiting = [rate for rate in waiting if not self.last[rate].is_near(self.tolerance)]

    async def _ask(self, rate: float, number: int) -> None:
        replies = await self.client.ask_all(self.prompts, rate, self.start(rate, number))
        self.last[rate] = RatePass.of(rate, number, replies)
        self.prices = await self.client.prices()

    def price(self, rate: float) -> float:
        """The gateway's current price for this rate; needs a pass first."""
        assert self.prices is not None
        points = tuple((each.rate, each.price) for each in self.prices.prices)
        return Calibration(points).price(rate)

    def far(self) -> list[float]:
        """The rates that are not realised yet."""
        return [rate for rate, realised in self.last.items() if not realised.is_near(self.tolerance)]
