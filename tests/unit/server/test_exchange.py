from collections import Counter

from server.exchange import Exchange, Report


def test_a_report_as_clients_see_it():
    report = Report(
        completion_tokens=7,
        tokens=3,
        calls=2,
        spans=[[3, 5], [6, 7]],
        denied=Counter(budget=1),
        degraded=True,
        source="teacher",
        finished=True,
    )
    assert report.as_dict() == {
        "tokens": 3,
        "calls": 2,
        "rate": 0.428571,
        "spans": [[3, 5], [6, 7]],
        "denied": {"budget": 1},
        "degraded": True,
        "clamped": False,
    }


def test_a_report_of_nothing():
    assert Report().as_dict() == {
        "tokens": 0,
        "calls": 0,
        "rate": 0.0,
        "spans": [],
        "denied": {},
        "degraded": False,
        "clamped": False,
    }


def test_a_span_without_a_token_is_not_shown():
    assert Report(spans=[[0, 0], [4, 6], [9, 9]]).as_dict()["spans"] == [[4, 6]]


def test_a_report_does_not_change_after_a_client_got_it():
    report = Report(spans=[[0, 1]])
    seen = report.as_dict()
    report.denied["budget"] += 1
    report.spans.append([2, 3])
    assert (seen["denied"], seen["spans"]) == ({}, [[0, 1]])


def test_choices_are_opened_in_order():
    exchange = Exchange()
    first, second = exchange.open(), exchange.open()
    assert exchange.reports == [first, second]
    assert first is exchange.reports[0]


def test_an_exchange_is_finished_with_its_last_choice():
    exchange = Exchange()
    assert not exchange.finished
    first, second = exchange.open(), exchange.open()
    exchange.hand_out(first, "student", finished=True)
    assert not exchange.finished
    exchange.hand_out(second, "teacher", finished=False)
    assert not exchange.finished
    exchange.hand_out(second, "teacher", finished=True)
    assert exchange.finished


def test_the_latest_report_is_of_the_choice_that_wrote_last():
    exchange = Exchange()
    first, second = exchange.open(), exchange.open()
    exchange.hand_out(first, "teacher", finished=False)
    assert exchange.latest is first
    exchange.hand_out(second, "student", finished=False)
    assert exchange.latest is second
    assert (first.source, second.source) == ("teacher", "student")


def test_the_total_of_one_choice_is_its_report():
    exchange = Exchange()
    report = exchange.open()
    assert exchange.total() is report


def test_the_total_of_several_choices_is_their_sum_without_spans():
    exchange = Exchange()
    exchange.reports = [
        Report(10, 2, 1, [[0, 2]], Counter(budget=1)),
        Report(30, 6, 3, [[0, 6]], Counter(budget=1, timeout=1), degraded=True),
    ]
    assert exchange.total().as_dict() == {
        "tokens": 8,
        "calls": 4,
        "rate": 0.2,
        "spans": [],
        "denied": {"budget": 2, "timeout": 1},
        "degraded": True,
        "clamped": False,
    }


def test_exchanges_do_not_share_reports():
    Exchange().open()
    assert Exchange().reports == []
