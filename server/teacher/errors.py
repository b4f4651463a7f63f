"""Errors between the gateway and its teacher."""

from typing import Literal

from router.errors import PeerError

Reason = Literal["unreachable", "timeout", "status", "nonsense", "breaker", "saturated"]

EXPLANATIONS: dict[Reason, str] = {
    "unreachable": "The teacher could not be reached.",
    "timeout": "The teacher did not answer in time.",
    "status": "The teacher answered with an error.",
    "nonsense": "The teacher's answer could not be used.",
    "breaker": "No teacher is available at the moment.",
    "saturated": "The teacher is busy.",
}
REFUSED = "The teacher refused this request."


class TeacherError(PeerError):
    """A teacher call failed, or was not made.

    The message is for the log: it names the replica and quotes its reply. Clients get `explanation`.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        refused: bool = False,
        well: bool = False,
        status: int | None = None,
    ) -> None:
        """Describe the failure.

        Args:
            reason: one of a few words, fit for a metric's label. "breaker" and "saturated" are calls that
                were not made, or that waited too long in the teacher's queue.
            message: the failure in one line, for the log.
            refused: the teacher would refuse the same call again.
            well: the failure is not a fault of the teacher.
            status: HTTP status of the answer, if it is not 200.
        """
        super().__init__(message)
        self.reason: Reason = reason
        self.refused = refused
        self.well = well or refused
        self.status = status

    @property
    def explanation(self) -> str:
        """The failure for clients: one of a few sentences, without names, addresses or replies."""
        return REFUSED if self.refused else EXPLANATIONS[self.reason]
