"""Counts the teacher's own tokens that the requests of one span read and write, and limits their cost."""

from dataclasses import dataclass, field

from router.money import TokenPrices, TokenUsage


@dataclass
class Meter:
    """Counts the requests of one span, one after the other.

    Nothing counts as cached until the teacher reports it (vLLM's `--enable-prompt-tokens-details`), so the
    cost is never too low.
    """

    prices: TokenPrices | None = None
    most: int | None = None
    """Most that all requests together may cost, in picos; None for no bound."""
    usage: TokenUsage = field(default_factory=TokenUsage)
    lost: bool = False
    """Whether a request broke off, so that the teacher may have written more than what arrived."""
    _reads: int = 0
    """Tokens that the current request reads, without those that are known to be cached."""
    _writes: int = 0
    _wrote: int = 0

    @property
    def cost(self) -> int | None:
        """Cost of all requests in picos; None if it is unknown, so that the whole reservation counts."""
        return None if self.prices is None or self.lost else self.prices.cost(self.usage)

    def admits(self, reads: int, writes: int) -> bool:
        """Whether the bound allows one more request, whatever is in the teacher's cache."""
        if self.most is None or self.prices is None:
            return True
        return not self.lost and self.prices.cost(self.usage) + self.prices.most(reads, writes) <= self.most

    def begin(self, reads: int, writes: int) -> None:
        """Count a request that reads ``reads`` tokens, and may write ``writes`` tokens."""
        self._reads = reads
        self._writes = writes
        self._wrote = 0
        self.usage.input += reads

    def failed(self, *, reached: bool) -> None:
        """Count a failed request; one that has not ``reached`` the teacher was not read."""
        if reached or self._wrote:
            self.lost = True
        else:
            self.usage.input -= self._reads
            self._reads = 0

    def wrote(self, tokens: int) -> None:
        """Count tokens that arrived."""
        self._wrote += tokens
        self.usage.output += tokens

    def report(self, cached: int, written: int) -> None:
        """Correct the count by the teacher's own report of a request that has ended."""
        cached = min(max(cached, 0), self._reads)
        self.usage.input -= cached
        self.usage.cached_input += cached
        self._reads -= cached
        self.wrote(max(0, min(written, self._writes) - self._wrote))
