"""The gateway's own routes, next to those of vLLM: readiness, budgets, prices and the playground."""

from pathlib import Path
from typing import Any, Literal, NotRequired

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse
from typing_extensions import TypedDict

from measuring.examples import load_sources
from server.http.access import owner_of
from server.http.budgets import BudgetsView, answer
from server.http.prices import PricesView, view
from server.teacher.teachers import Teachers
from server.tenants import Tenants

PLAYGROUND = Path(__file__).with_name("playground.html")
# The page is self-contained: it may load nothing from elsewhere and talk to this gateway only.
PLAYGROUND_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


class Ready(TypedDict):
    """Whether student and teacher answer, and whether they share a vocabulary."""

    student: bool
    teacher: bool
    teacher_vocabulary: Literal["same", "other"]
    teachers: NotRequired[dict[str, bool]]
    """Whether each teacher answers, by its name; only if the teachers have names."""


def routes(examples: Path | None, tenants: Tenants | None) -> APIRouter:
    """The gateway's own routes; ``examples``: JSONL file of prompts (`source`) for the playground."""
    router = APIRouter()
    prompts = [] if examples is None else load_sources(examples)

    @router.get("/ready", response_model=Ready, responses={503: {"model": Ready, "description": "Not ready"}})
    async def ready(request: Request) -> JSONResponse:
        """200 if the student's engine and a teacher answer, else 503; the body tells which of them do."""
        engine: Any = request.app.state.engine_client
        student = engine.is_running and not engine.errored
        teachers: Teachers = engine.cooperation.teachers
        each = await teachers.healthy()
        teacher = any(each[model.name] for model in teachers.models or teachers)
        others = any(model.translator is not None for model in teachers.models)
        state = Ready(student=student, teacher=teacher, teacher_vocabulary="other" if others else "same")
        if teachers.have_names:
            state["teachers"] = each
        return JSONResponse(state, status_code=200 if student and teacher else 503)

    @router.get("/budgets")
    async def budgets(request: Request) -> BudgetsView:
        """Limits that requests share: a tenant's key shows its own, the admin's all of them."""
        engine: Any = request.app.state.engine_client
        return await answer(engine.cooperation.shared, tenants, owner_of(request.scope))

    @router.get("/prices")
    async def prices(request: Request) -> PricesView:
        """The price of a teacher token at each rate, and what the rates realised."""
        engine: Any = request.app.state.engine_client
        return view(engine.cooperation.policy.calibration, engine.cooperation.router)

    @router.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(PLAYGROUND, headers=PLAYGROUND_HEADERS)

    @router.get("/playground/examples", include_in_schema=False)
    async def playground_examples() -> list[str]:
        return prompts

    return router
