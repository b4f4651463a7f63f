"""The reply of `GET /prices` for a policy's calibration."""

import json

from router.adaptive import KNOTS, AdaptiveCalibration
from router.policy import Calibration
from server.http.prices import view


def test_learned_prices_are_shown_with_their_realised_rates() -> None:
    calibration = AdaptiveCalibration("margin", 1)
    calibration.observe(0.1, 20, 100)
    told = json.loads(json.dumps(view(calibration, None), allow_nan=False))
    assert told["router"] is None
    assert told["learned"] is True
    assert [point["rate"] for point in told["prices"]] == list(KNOTS)
    assert told["prices"][3] == {"rate": 0.1, "price": calibration.price(0.1)}
    assert told["realised"] == [{"aim": 0.1, "rate": 0.2, "completion_tokens": 100}]


def test_measured_prices_are_shown_unchanged() -> None:
    told = view(Calibration(((0.1, 2.0), (0.3, 1.0))), "a1b2")
    assert told == {
        "router": "a1b2",
        "learned": False,
        "prices": [{"rate": 0.1, "price": 2.0}, {"rate": 0.3, "price": 1.0}],
        "realised": [],
    }
