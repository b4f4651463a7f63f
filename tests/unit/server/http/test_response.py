"""Our fields in responses, and the endings of responses that fail."""

import json
from http import HTTPStatus
from typing import Any

import pytest

from server.exchange import EXCHANGE, Exchange, Report
from server.http.asgi import REQUEST_ID
from server.vllm_api import GracefulHTTPError, VLLMValidationError
from tests.helpers.upstream import COMPLETIONS, Receive, Send, Upstream, post, request

# JSON responses

TWO_OF_TEN = Report(completion_tokens=10, tokens=2, calls=1, spans=[[3, 5]], finished=True)
FIVE_OF_TEN = Report(completion_tokens=10, tokens=5, calls=2, spans=[[0, 4], [9, 10]], finished=True)


async def test_a_response_carries_the_report():
    body = json.dumps({"id": "cmpl-1", "choices": [{"index": 0, "text": "für 5 €"}]}).encode()
    answer = await post(Upstream(chunks=(body,), reports=(TWO_OF_TEN,)), request())
    assert answer.json == {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": "für 5 €"}],
        "teacher": {
            "tokens": 2,
            "calls": 1,
            "rate": 0.2,
            "spans": [[3, 5]],
            "denied": {},
            "degraded": False,
            "clamped": False,
        },
    }


async def test_the_lengths_and_the_other_headers_are_right():
    answer = await post(Upstream(chunks=(b'{"a":', b" 1}")), request())
    assert answer.headers[b"content-length"] == str(len(answer.body)).encode()
    assert answer.headers[b"x-request-id"] == b"17"
    assert answer.json.keys() == {"a", "teacher"}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_a_response_without_choices_carries_the_report(path):
    answer = await post(Upstream(chunks=(b'{"output": []}',), reports=(TWO_OF_TEN,)), request(), path=path)
    assert answer.json["teacher"]["tokens"] == 2


async def test_several_choices_have_their_own_reports():
    choices = [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]
    upstream = Upstream(
        chunks=(json.dumps({"choices": choices}).encode(),), reports=(TWO_OF_TEN, FIVE_OF_TEN)
    )
    answer = await post(upstream, request(n=2))
    by_text = {choice["text"]: choice["teacher"] for choice in answer.json["choices"]}
    assert (by_text["a"]["tokens"], by_text["a"]["spans"]) == (2, [[3, 5]])
    assert (by_text["b"]["tokens"], by_text["b"]["spans"]) == (5, [[0, 4], [9, 10]])
    assert answer.json["teacher"] == {
        "tokens": 7,
        "calls": 3,
        "rate": 0.35,
        "spans": [],
        "denied": {},
        "degraded": False,
        "clamped": False,
    }


@pytest.mark.parametrize(
    ("status", "content_type"), [(400, "application/json"), (502, "application/json"), (200, "text/plain")]
)
async def test_errors_and_other_types_are_not_touched(status, content_type):
    chunks = (b'data: {"error": ', b'"x"}')
    answer = await post(Upstream(status, content_type, chunks), request(teacher_budget=0.1))
    assert answer.status == status
    assert answer.chunks[:2] == list(chunks)


# Streams


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def delta(text: str, index: int = 0) -> bytes:
    return event({"id": "cmpl-1", "choices": [{"index": index, "text": text}]})


def stream(*chunks: bytes, **more: Any) -> Upstream:
    return Upstream(content_type="text/event-stream; charset=utf-8", chunks=chunks, **more)


async def test_every_chunk_of_a_stream_names_its_source():
    sources = ["student", "teacher", "student"]

    def hand_out(index: int, exchange: Exchange) -> None:
        if index < 3:
            exchange.hand_out(exchange.reports[0], sources[index], finished=index == 2)

    report = Report(completion_tokens=3, tokens=1, calls=1, spans=[[1, 2]])
    answer = await post(
        stream(
            delta("a"), delta("b"), delta("c"), b"data: [DONE]\n\n", reports=(report,), before_chunk=hand_out
        ),
        request(stream=True),
    )
    assert [e["source"] for e in answer.events] == sources
    assert [e["choices"][0]["text"] for e in answer.events] == ["a", "b", "c"]
    assert ["teacher" in e for e in answer.events] == [False, False, True]
    assert answer.events[2]["teacher"]["spans"] == [[1, 2]]
    assert answer.chunks[3] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("first", [{"id": "cmpl-1"}, {"object": "chunk"}], ids=["not parsed", "parsed"])
@pytest.mark.parametrize("finished", [False, True])
async def test_an_event_that_is_not_parsed_gets_the_same_source(first, finished):
    """An event of vLLM that starts with its id gets its source, and the rest of it is not parsed."""
    document = first | {"choices": [{"index": 0, "text": 'für 5 €", "source": "x'}], "usage": None}
    chunk = b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"
    report = Report(10, 2, source="teacher", finished=finished)
    answer = await post(stream(chunk, reports=(report,)), request(stream=True))
    (got,) = answer.events
    assert got.pop("source") == "teacher"
    assert got.pop("teacher", None) == (report.as_dict() if finished else None)
    assert got == document
    assert answer.chunks[0].endswith(b"}\n\n")


async def test_the_choices_of_a_stream_have_their_own_sources_and_reports():
    def hand_out(index: int, exchange: Exchange) -> None:
        exchange.hand_out(exchange.reports[index % 2], ["student", "teacher"][index % 2], finished=index > 1)

    answer = await post(
        stream(
            delta("a", 0),
            delta("b", 1),
            delta("c", 0),
            delta("d", 1),
            reports=(Report(10, 2), Report(10, 5)),
            before_chunk=hand_out,
        ),
        request(stream=True, n=2),
    )
    assert [e["source"] for e in answer.events] == ["student", "teacher", "student", "teacher"]
    assert [e.get("teacher", {}).get("tokens") for e in answer.events] == [None, None, 2, 5]


async def test_the_usage_chunk_carries_the_total():
    upstream = stream(event({"choices": [], "usage": {"total_tokens": 9}}), reports=(TWO_OF_TEN, FIVE_OF_TEN))
    (usage,) = (await post(upstream, request(stream=True))).events
    assert (usage["usage"], usage["teacher"]["tokens"]) == ({"total_tokens": 9}, 7)


async def test_events_without_choices_carry_the_total_when_all_is_written():
    """/v1/responses and /v1/messages stream such events, with the event's name on a line of its own."""

    def hand_out(index: int, exchange: Exchange) -> None:
        exchange.hand_out(exchange.reports[0], "teacher", finished=index == 1)

    chunks = [b"event: " + name + b"\n" + event({"type": name.decode()}) for name in (b"delta", b"stop")]
    answer = await post(
        stream(*chunks, reports=(Report(10, 2),), before_chunk=hand_out), request(), path="/v1/messages"
    )
    assert [e["source"] for e in answer.events] == ["teacher", "teacher"]
    assert ["teacher" in e for e in answer.events] == [False, True]
    assert answer.chunks[1].startswith(b"event: stop\ndata: {")
    assert answer.chunks[1].endswith(b"}\n\n")


async def test_several_events_may_come_in_one_chunk():
    answer = await post(stream(delta("a") + delta("b") + b"data: [DONE]\n\n"), request(stream=True))
    assert [e["source"] for e in answer.events] == ["student", "student"]
    assert answer.chunks[0].endswith(b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("line", [b": ping\n\n", b"data: [DONE]\n\n", event({"error": {"message": "x"}})])
async def test_comments_endings_and_errors_are_not_touched(line):
    assert (await post(stream(line), request(stream=True))).chunks[0] == line


# Streams that fail

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
LOST = GracefulHTTPError("the teacher failed: gone", HTTPStatus.BAD_GATEWAY)
CREATED = b"event: response.created\n" + event({"type": "response.created", "sequence_number": 0})
PROGRESS = b"event: response.in_progress\n" + event({"type": "response.in_progress", "sequence_number": 1})
DELTA = b"event: response.output_text.delta\n" + event({"type": "x", "sequence_number": 2, "delta": "a"})
TEXT = b"event: content_block_delta\n" + event({"type": "content_block_delta"})
# Events that vLLM sends after the failure, by surface; None: it raises.
VLLMS_END = {
    COMPLETIONS: event({"error": {"message": "the teacher failed: gone", "code": 502}}),
    RESPONSES: None,
    MESSAGES: b"event: error\n" + event({"type": "error", "error": {"message": "2 validation errors"}}),
}
FIRST = {COMPLETIONS: delta("a"), RESPONSES: DELTA, MESSAGES: TEXT}


def failing(path: str, *before: bytes, error: Exception = LOST, noted: bool = True) -> Any:
    """vLLM's app with an engine that fails after the app has sent ``before``."""
    end = VLLMS_END[path]

    async def app(scope: dict, receive: Receive, send: Send) -> None:
        exchange = EXCHANGE.get()
        exchange.open()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in before:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        exchange.failure = error if noted else None
        if end is None:
            raise RuntimeError("response already started") from error
        await send({"type": "http.response.body", "body": end, "more_body": True})
        await send({"type": "http.response.body"})

    return app


@pytest.mark.parametrize("path", VLLMS_END)
async def test_a_failure_after_the_first_token_is_the_last_event(path):
    REQUEST_ID.set("order-7")
    opening = (CREATED, PROGRESS) if path == RESPONSES else ()
    answer = await post(failing(path, *opening, FIRST[path]), request(stream=True), path=path)
    assert answer.status == 200
    *_, last = answer.events
    assert len(answer.events) == len(opening) + 2
    assert last["error"]["message"] == "the teacher failed: gone"
    if path == MESSAGES:
        error = {"type": "api_error", "message": "the teacher failed: gone"}
        assert last == {"type": "error", "error": error, "request_id": "order-7"}
        assert b"event: error\ndata: {" in answer.body
    if path == RESPONSES:
        assert (last["type"], last["sequence_number"], last["code"]) == ("error", 3, "502")
        assert last["message"] == "the teacher failed: gone"
        assert answer.chunks[-1].startswith(b"event: error\ndata: {")
        assert answer.body.endswith(b"}\n\n")


@pytest.mark.parametrize(
    ("error", "status", "type_"),
    [
        (LOST, 502, "api_error"),
        (VLLMValidationError("no", parameter="top_p"), 400, "invalid_request_error"),
        (RuntimeError("dead"), 500, "api_error"),
    ],
    ids=["teacher", "validation", "engine"],
)
@pytest.mark.parametrize("path", VLLMS_END)
async def test_a_failure_before_the_first_token_has_its_status(path, error, status, type_):
    opening = (CREATED, PROGRESS) if path == RESPONSES else ()
    answer = await post(failing(path, *opening, error=error), request(stream=True), path=path)
    assert (answer.status, len(answer.chunks)) == (status, 1)
    assert answer.headers[b"content-type"] == b"application/json"
    if path == MESSAGES:
        assert (answer.json["type"], answer.json["error"]["type"]) == ("error", type_)
    else:
        assert answer.json["error"]["code"] == status


@pytest.mark.parametrize("path", VLLMS_END)
async def test_an_unexpected_failure_reveals_nothing_internal(path):
    secret = ValueError("2 validation errors, at /home")
    answer = await post(
        failing(path, FIRST[path], error=secret, noted=False), request(stream=True), path=path
    )
    if path != COMPLETIONS:  # there vLLM's own last event has it
        assert answer.events[-1]["error"]["message"] == "Internal server error"
    assert b"/home" not in answer.body


async def test_failures_before_a_response_are_left_to_vllm():
    async def app(scope: dict, receive: Receive, send: Send) -> None:
        raise RuntimeError("not begun")

    with pytest.raises(RuntimeError, match="not begun"):
        await post(app, request(stream=True), path=RESPONSES)


async def test_a_comment_that_keeps_the_connection_alive_is_not_held_back():
    answer = await post(stream(b": keep-alive\n\n", VLLMS_END[COMPLETIONS]), request(stream=True))
    assert answer.chunks[0] == b": keep-alive\n\n"


@pytest.mark.parametrize(("status", "noted"), [(502, True), (400, True), (500, False)])
async def test_anthropics_clients_get_anthropics_names(status, noted):
    """vLLM uses Anthropic's shape, but with OpenAI's type names."""
    said = json.dumps({"type": "error", "error": {"type": "Bad Gateway", "message": "broken"}}).encode()
    error = GracefulHTTPError("broken", HTTPStatus(status)) if noted else None

    def note(_: int, exchange: Exchange) -> None:
        exchange.failure = error

    upstream = Upstream(status, chunks=(said,), before_start=lambda exchange: note(0, exchange))
    answer = await post(upstream, request(), path=MESSAGES)
    expected = "invalid_request_error" if status == 400 else "api_error"
    assert (answer.status, answer.json["error"]) == (status, {"type": expected, "message": "broken"})
    elsewhere = Upstream(status, chunks=(said,), before_start=lambda exchange: note(0, exchange))
    assert (await post(elsewhere, request())).body == said


async def test_refusals_by_vllm_itself_keep_their_words():
    said = b'{"error": {"type": "Bad Request"}}'
    assert (await post(Upstream(400, chunks=(said,)), request(), path=MESSAGES)).body == said


# Beam search


async def test_a_beam_search_is_counted_by_its_choices():
    """The engine sees only steps; the response has the choices."""
    counted: list[list[Report]] = []
    body = {"choices": [{"index": 0}, {"index": 1}], "usage": {"completion_tokens": 9}}

    def search(_: int, exchange: Exchange) -> None:
        exchange.searched = counted.append

    upstream = Upstream(chunks=(json.dumps(body).encode(),), reports=(), before_chunk=search)
    answer = await post(upstream, request(use_beam_search=True, n=2))
    ((first, second),) = counted
    assert first.completion_tokens + second.completion_tokens == 9
    assert (first.finished, second.finished) == (True, True)
    assert [choice["teacher"]["tokens"] for choice in answer.json["choices"]] == [0, 0]
