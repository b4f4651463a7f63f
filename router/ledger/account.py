"""The state of one scope: a sliding window of spent tokens, and the leases on tokens that may be spent."""

from dataclasses import dataclass

from router.ledger.base import SUB_WINDOWS, OnExpiry, Settlement, Snapshot, sub_window_ms


@dataclass(frozen=True)
class _Held:
    tokens: int
    expires_ms: int


class Account:
    """The state of a scope in one process, kept as `router.ledger.scripts` keeps it in Redis.

    All times are ms of one clock. Amounts are teacher tokens, or nanos for a limit in money.

    The window is the current sub-window and the 60 before it, so it is never shorter than configured. A
    lease counts whatever the window covers. Its tokens are charged when they are settled, and so after the
    last of them was written. Hence any interval of the window's length holds no more than the limit: at its
    last reservation, all tokens written in it are still leased, or charged to a sub-window that the window
    still covers.
    """

    def __init__(self, window_ms: int, on_expiry: OnExpiry, *, gone: bool = False) -> None:
        """``gone``: whether this is a session that is over, which has no room."""
        self.gone = gone
        self._width = sub_window_ms(window_ms)
        self._on_expiry = on_expiry
        self._now = 0
        self._newest = 0
        self._spent_in: dict[int, int] = {}
        self._student_in: dict[int, int] = {}
        self.spent = self.student = self.reserved = 0
        self._total_spent = self._total_student = 0
        self._leases: dict[str, _Held] = {}  # in the order of their expiry: all are equally long
        self._lapsed: dict[str, _Held] = {}

    def advance(self, now_ms: int) -> None:
        """Let time pass: leases expire, sub-windows leave the window. A clock set back stands still."""
        self._now = max(self._now, now_ms)
        while self._leases:
            lease_id, held = next(iter(self._leases.items()))
            if held.expires_ms > self._now:
                break
            del self._leases[lease_id]
            self.reserved -= held.tokens
            self._lapsed[lease_id] = held
            if self._on_expiry == "charge":
                self._charge(held.expires_ms // self._width, held.tokens)
        if self._now // self._width > self._newest:
            self._roll(self._now // self._width)

    def hold(self, lease_id: str, tokens: int, lease_ms: int) -> None:
        """Reserve tokens for a lease."""
        self._leases[lease_id] = _Held(tokens, self._now + lease_ms)
        self.reserved += tokens

    def settle(self, lease_id: str, used: int) -> Settlement:
        """Charge what a lease has used and give back the rest."""
        if held := self._leases.pop(lease_id, None):
            self.reserved -= held.tokens
            self._charge(self._newest, used)
            return "settled"
        if held := self._lapsed.pop(lease_id, None):
            # Its tokens were written before it ended, so they are charged to that time.
            charged = held.tokens if self._on_expiry == "charge" else 0
            self._charge(held.expires_ms // self._width, used - charged)
            return "late"
        return "unknown"

    def record(self, student_tokens: int) -> None:
        """Count tokens that the student wrote."""
        self._student_in[self._newest] = self._student_in.get(self._newest, 0) + student_tokens
        self.student += student_tokens
        self._total_student += student_tokens

    def snapshot(self) -> Snapshot:
        """The account's state at this moment."""
        return Snapshot(
            now_ms=self._now,
            sub_window_ms=self._width,
            spent_in=dict(self._spent_in),
            spent=self.spent,
            student=self.student,
            reserved=self.reserved,
            total_spent=self._total_spent,
            total_student=self._total_student,
            next_expiry_ms=next((held.expires_ms for held in self._leases.values()), None),
        )

    @property
    def _oldest(self) -> int:
        return self._newest - SUB_WINDOWS

    def _charge(self, sub_window: int, tokens: int) -> None:
        self._total_spent += tokens
        if sub_window >= self._oldest:
            self._spent_in[sub_window] = self._spent_in.get(sub_window, 0) + tokens
            self.spent += tokens

    def _roll(self, newest: int) -> None:
        self._newest = newest
        for sub_window in [s for s in self._spent_in if s < self._oldest]:
            self.spent -= self._spent_in.pop(sub_window)
        for sub_window in [s for s in self._student_in if s < self._oldest]:
            self.student -= self._student_in.pop(sub_window)
        left = self._oldest * self._width
        for lease_id in [i for i, held in self._lapsed.items() if held.expires_ms < left]:
            del self._lapsed[lease_id]
