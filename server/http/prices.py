"""The response of `GET /prices`: the price of a teacher token at each rate, and the realised rates."""

from typing_extensions import TypedDict

from router.adaptive import AdaptiveCalibration
from router.policy import Prices


class PriceView(TypedDict):
    """The price of a teacher token at one teacher rate."""

    rate: float
    price: float


class RealisedView(TypedDict):
    """The realised rate for one aimed rate, over recent traffic."""

    aim: float
    rate: float
    completion_tokens: float


class PricesView(TypedDict):
    """The body of the response."""

    router: str | None
    """Digest of the router in use; null without a router."""
    learned: bool
    """Whether the traffic moves the prices; if not, they were measured with the router or set."""
    prices: list[PriceView]
    """Prices by increasing rate."""
    realised: list[RealisedView]
    """Realised rates; empty unless the prices are learned."""


def view(calibration: Prices, router: str | None) -> PricesView:
    """The body of the response, ready for JSON.

    ``router``: digest of the router in use; None without a router.
    """
    prices: list[PriceView] = [{"rate": rate, "price": price} for rate, price in calibration.points]
    if not isinstance(calibration, AdaptiveCalibration):
        return {"router": router, "learned": False, "prices": prices, "realised": []}
    realised: list[RealisedView] = []
    for aim, rate, completion_tokens in calibration.realised:
        realised.append({"aim": aim, "rate": rate, "completion_tokens": completion_tokens})
    return {"router": router, "learned": True, "prices": prices, "realised": realised}
