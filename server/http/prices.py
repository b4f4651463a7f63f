"""The response of `GET /prices`: the price of a teacher token at each rate, and the realised rates."""

from typing_extensions import TypedDict

from router.adaptive import AdaptiveCalibration
from router.policy import Prices


class PriceView(TypedDict):
    """The price at one rate."""

    rate: float
    price: float


class RealisedView(TypedDict):
    """What came of one rate, over recent traffic."""

    aim: float
    rate: float
    completion_tokens: float


class PricesView(TypedDict):
    """The whole answer."""

    router: str | None
    """Digest of the router in use; null where there is none."""
    learned: bool
    """Whether the traffic moves the prices; if not, they were measured with the router or set."""
    prices: list[PriceView]
    """By rate, increasing."""
    realised: list[RealisedView]
    """Only where the prices are learned."""


def view(calibration: Prices, router: str | None) -> PricesView:
    """The answer as JSON knows it.

    ``router``: digest of the one in use.
    """
    prices: list[PriceView] = [{"rate": rate, "price": price} for rate, price in calibration.points]
    if not isinstance(calibration, AdaptiveCalibration):
        return {"router": router, "learned": False, "prices": prices, "realised": []}
    realised: list[RealisedView] = []
    for aim, rate, completion_tokens in calibration.realised:
        realised.append({"aim": aim, "rate": rate, "completion_tokens": completion_tokens})
    return {"router": router, "learned": True, "prices": prices, "realised": realised}
