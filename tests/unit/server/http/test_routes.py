"""Every route of vLLM's own app that writes a completion reads our fields, however its path is written."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.http.fields import PATHS
from server.vllm_api import HttpLayer
from tests.helpers.paths import ROOT

ROOT_PATH = "/api"
STUDENT = ROOT / "deploy" / "demo" / "student"
# These routes take a POST and ask no engine for tokens.
WRITE_NOTHING = {
    "/tokenize",
    "/detokenize",
    "/ping",
    "/v1/messages/count_tokens",
    "/v1/responses/{response_id}/cancel",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/inference/v1/abort_requests",
    *(f"{path}/render" for path in PATHS),
    *(f"{path}/derender" for path in PATHS),
}


@pytest.fixture(scope="module")
def app() -> Any:
    """vLLM's app as the gateway builds it, without an engine."""
    http = HttpLayer()
    middleware = "server.http.fields.TeacherFields"
    arguments = http.parse({"model": str(STUDENT), "middleware": middleware, "root-path": ROOT_PATH})
    return http.build_app(arguments, ("generate",), None)


def posts(routes: Any) -> Iterator[str]:
    for route in routes:
        if getattr(route, "path", None) is None:  # a router that was included
            yield from posts(route.original_router.routes)
        elif "POST" in (getattr(route, "methods", None) or ()):
            yield route.path


def test_every_route_that_takes_a_post_is_known(app: Any) -> None:
    """A new route of vLLM is a way around budgets and tenants until somebody has checked it."""
    assert set(posts(app.routes)) <= {*PATHS, *WRITE_NOTHING}


@pytest.mark.parametrize("path", sorted(PATHS))
async def test_no_spelling_of_a_path_avoids_the_budget(app: Any, path: str) -> None:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    seen = 0
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for prefix in ("", ROOT_PATH, f"{ROOT_PATH}/", "/", ROOT_PATH.upper(), ROOT_PATH + ROOT_PATH):
            for suffix in ("", "/", "//", "?x=1", "/x", "%2F"):
                reply = await client.post(prefix + path + suffix, json={"teacher_budget": 2})
                if reply.status_code in (307, 404, 405):
                    continue
                seen += 1
                assert reply.status_code == 400
                assert "teacher_budget.fraction" in json.dumps(reply.json()), (prefix, suffix)
    assert seen >= 4  # with the root path and without, each also with a query
