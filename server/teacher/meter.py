"""Counts the teacher's own tokens that the requests of one span read and write, and limits their cost."""

from dataclasses import dataclass, field

from router.money import TokenPrices, TokenUsage


@dataclass
class Meter:
    """Counts the requests of one span, one after the other.

    Nothing counts as cached until the teacher reports it (vLLM's `--enable-prompt-tokens-details`), so what
    is counted is never too little.
    """

    prices: TokenPrices | None = None
    most: int | None = None
    """Picos that all requests together may cost; None for no bound."""
    usage: TokenUsage = field(default_factory=TokenUsage)
    lost: bool = False
    """A request broke off: the teacher may have written more than what arrived."""
    _reads: int = 0
    """Of the request under way."""
    _writes: int = 0
    _wrote: int = 0

    @property
    def cost(self) -> int | None:
        """Picos; None if nobody can tell, so that all that was reserved counts."""
        return None if self.prices is None or self.lost else self.prices.cost(self.usage)

    def admits(self, reads: int, writes: int) -> bool:
        """Whether one more request may be made: the bound holds whatever is in the teacher's cache."""
        if self.most is None or self.prices is None:
            return True
        return not self.lost and self.prices.cost(self.usage) + self.prices.most(reads, writes) <= self.most

    def begin(self, reads: int, writes: int) -> None:
        """A request goes out that reads this many tokens, and may write that many."""
        self._reads = reads
        self._writes = writes
        self._wrote = 0
        self.usage.input += reads

    def failed(self, *, reached: bool) -> None:
        """The request failed; if nothing of it ``reached`` the teacher, it was not read."""
        if reached or self._wrote:
            self.lost = True
        else:
            self.usage.input -= self._reads
            self._reads = 0

    def wrote(self, tokens: int) -> None:
        """Tokens arrived."""
        self._wrote += tokens
        self.usage.output += tokens

    def report(self, cached: int, written: int) -> None:
        """What the teacher itself counted of a request that has ended."""
        cached = min(max(cached, 0), self._reads)
        self.usage.input -= cached
        self.usage.cached_input += cached
        self._reads -= cached
        self.wrote(max(0, min(written, self._writes) - self._wrote))
