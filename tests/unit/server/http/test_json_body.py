"""One reader of bodies follows one rule, with a budget and without."""

import json

import pytest

from tests.helpers.upstream import Upstream, post

HALF = b"a string with half of a surrogate pair"
NO_JSON = [
    (b"", None, b"the body is not JSON"),
    (b"{", None, b"the body is not JSON"),
    (b"model=wheels", None, b"the body is not JSON"),
    (b"\xff\xfe\x00", None, b"the body is not Unicode text"),
    (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", None, b"the body is not"),  # gzip
    (b'{"prompt": "\xff"%s}', None, b"the body is not Unicode text"),
    (b'{"prompt": "\xed\xa0\x80"%s}', None, b"the body is not Unicode text"),
    (b'{"seed": ' + b"1" * 5000 + b"%s}", None, b"the body has a number of too many digits"),
    (b"[" * 100_000, None, b"the body is nested more than 200 levels deep"),
    (b'{"x": ' + b"[" * 300 + b"]" * 300 + b"%s}", "x", b"nested more than 200 levels deep"),
    (b'{"x": ' + b'{"y": ' * 300 + b"1" + b"}" * 300 + b"%s}", "x", b"nested more than 200 levels deep"),
    (b'{"top_p": NaN%s}', "top_p", b"top_p: JSON has finite numbers only"),
    (b'{"logit_bias": {"3": -Infinity}%s}', "logit_bias", b"logit_bias.3: JSON has finite numbers only"),
    (b'{"temperature": 1e999%s}', "temperature", b"finite numbers only"),
    (b'{"temperature": 1' + b"0" * 400 + b".0%s}", "temperature", b"finite numbers only"),
    (b'{"teacher_budget": NaN}', "teacher_budget", b"teacher_budget: JSON has finite numbers only"),
    (b'{"teacher_budget": {"\\ud800": 3}}', "teacher_budget", HALF),
    (b'{"stop": ["a", "\\ud800"]%s}', "stop", b"stop[1]: " + HALF),
    (b'{"messages": [{"content": "\\uDFFF!"}]%s}', "messages", b"messages[0].content: " + HALF),
    (b'{"model": "\\ud83d"%s}', "model", HALF),
    (b'{"user": "\\udE00\\ud83d"%s}', "user", HALF),
    (b'{"metadata": {"\\ud800": "x"}%s}', "metadata", HALF),
    (b'{"\\ud800": "x"%s}', "?", HALF),
]


@pytest.mark.parametrize(("body", "param", "said"), NO_JSON, ids=range(len(NO_JSON)))
async def test_a_body_that_is_not_json_is_refused_with_a_budget_and_without(body, param, said):
    for budget in (b"", b', "teacher_budget": 0', b', "teacher_budget": 0.5'):
        upstream = Upstream()
        answer = await post(upstream, body.replace(b"%s", budget))
        assert (answer.status, upstream.calls) == (400, 0), budget
        assert answer.json["error"]["param"] == param, budget
        assert said in answer.body, budget
        assert len(answer.body) < 400, budget


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\\ud83d\\ude00 NaN Infinity \\\\ud800", "seed": 1e300}',
        b'{"logit_bias": {"3": -1e-999}, "prompt": ' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"messages": [' + b'{"content": []},' * 300 + b"{}]}",
        b'{"seed": ' + b"1" * 4000 + b"}",
    ],
    ids=["whole characters", "deep enough", "wide", "long"],
)
async def test_a_json_body_passes_with_a_budget_and_without(body):
    for field in (b"", b'"teacher_budget": 0, '):
        upstream = Upstream()
        assert (await post(upstream, b"{" + field + body[1:])).status == 200
        assert json.loads(upstream.body) == json.loads(body)
