"""Assembles the gateway from its configuration, and runs it."""

import asyncio
import hashlib
import json
import logging
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop
from fastapi import FastAPI

from router.checkpoint import MERGED_ROUTER, CheckpointError, RouterCheckpoint, vocabulary
from router.controller import PriceController
from router.policy import Calibration, Policy
from router.reserved import ReservedRows
from server.config import ConfigError, ServeConfig
from server.engine import Cooperation, CooperativeEngine
from server.gate_processor import gate_settings
from server.http.access import Access
from server.http.fields import TeacherFields
from server.http.lifecycle import CUT_OFF_SECONDS, KEEP_ALIVE_SECONDS, EngineDied, Lifecycle
from server.http.openapi import document
from server.http.request_id import RequestIds, log_with_ids
from server.http.routes import routes
from server.http.tracing import Traces
from server.metrics import PRICE
from server.reload import RouterReload
from server.shared import SharedBudgets
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError
from server.teacher.pool import TeacherPool
from server.teacher.vocabulary import SameVocabulary
from server.tenants import Tenants
from server.vllm_api import AsyncEngineArgs, HttpLayer, UsageContext, current_platform, parses_streams

logger = logging.getLogger(__name__)


def run(config: ServeConfig) -> int:
    """Serve until a signal ends it; the exit status, 1 where requests were cut off.

    Raises:
        ConfigError, CheckpointError, TeacherError: the gateway cannot start; one line says why.
        EngineDied: it cannot go on.
    """
    log_with_ids()
    router, student = _student(config)
    return uvloop.run(_serve(config, router, student))


def _student(config: ServeConfig) -> tuple[RouterCheckpoint | None, Path]:
    """The router, where there is one, and the directory that the engine loads: both in one."""
    merged_router = config.student / MERGED_ROUTER
    if config.router is None:
        if merged_router.is_dir():
            return RouterCheckpoint.load(merged_router), config.student
        if config.gate == "learned":
            raise ConfigError(
                "the learned gate needs a router checkpoint (--router), or choose another --gate"
            )
        return None, config.student
    router = RouterCheckpoint.load(config.router)
    router.check_student(config.student)
    # The merged student links to files of the original: another place makes another one.
    key = hashlib.sha256(f"{router.digest()} {config.student.resolve()}".encode()).hexdigest()
    merged = config.cache / "merged" / key[:16]
    if not merged.is_dir():
        router.merge(config.student, merged)
    return router, merged


def _reserved_rows(router: RouterCheckpoint | None, student: Path) -> ReservedRows:
    if router is not None:
        return router.reserved
    known = max(token_id for _, token_id in vocabulary(student)) + 1
    try:
        rows = json.loads((student / "config.json").read_text())["vocab_size"]
        return ReservedRows.at_end(rows, known)
    except KeyError as error:
        raise ConfigError(f"{student}/config.json has no {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{student}: {error}") from error


def _policy(config: ServeConfig, router: RouterCheckpoint | None, max_len: int) -> Policy:
    if router is not None and router.config.budget_prompt is not None:
        raise ConfigError(
            "the router wants budgets in words in the prompt, which the gateway does not write: "
            "train one with router.conditioning price"
        )
    expected = router.config.expected_tokens if router else max_len / 4
    span_tokens, ask_tokens = _spans(config, router)
    if config.aim == "rate" and (config.price is not None or router is None):
        raise ConfigError("aim rate needs a router checkpoint with its calibration, and no fixed price")
    if config.price is not None:
        return Policy(Calibration(((0.5, config.price),)), expected)
    calibrated = router is not None and (span_tokens, ask_tokens) == _spans(None, router)
    if calibrated and config.gate in router.config.calibration:
        try:
            spare = router.spare(config.gate) if config.aim == "rate" else None
        except CheckpointError as error:
            raise ConfigError(f"aim rate: {error}") from error
        return Policy(router.calibration(config.gate), expected, spare)
    if config.gate == "random":
        return Policy(Calibration.of_random_gate(ask_tokens), expected)
    raise ConfigError(
        f"the gate {config.gate} is not calibrated for this pair and spans of {span_tokens}: "
        "give a router checkpoint that has its calibration, or a fixed --price"
    )


def _spans(config: ServeConfig | None, router: RouterCheckpoint | None) -> tuple[int, int]:
    """(span_tokens, ask_tokens): the configuration's, else the router's."""
    span_tokens = (config and config.span_tokens) or (router.config.span_tokens if router else 1)
    ask_tokens = (
        (config and config.ask_tokens) or (router.config.ask_tokens if router else None) or span_tokens
    )
    if ask_tokens > span_tokens:
        raise ConfigError(f"ask_tokens: {ask_tokens} is more than a span of {span_tokens}")
    return span_tokens, ask_tokens


def _vllm_arguments(
    config: ServeConfig, student: Path, reserved: ReservedRows, router: RouterCheckpoint | None
) -> Namespace:
    """vLLM's own server arguments, parsed and checked by vLLM's own parser."""
    ours: dict[str, Any] = {
        "model": str(student),
        "served-model-name": config.served_model_name,
        "host": config.host,
        "port": config.port,
        "middleware": f"{TeacherFields.__module__}.{TeacherFields.__name__}",
        "logits-processors": "server.gate_processor:GateProcessor",
        "worker-extension-cls": "server.gate_processor.RouterLoader",
        "additional-config": json.dumps(
            gate_settings(reserved, config.gate, None if router is None else student / MERGED_ROUTER)
        ),
    }
    theirs = config.vllm_settings
    if config.tenants is not None and "api-key" in theirs:
        raise ConfigError("tenants have API keys of their own: leave out vllm's api-key")
    if current_platform.is_cpu():
        # The CPU default of 128 would recompute whole short prompts after every span.
        theirs.setdefault("block-size", 32)
    # What is in mid-answer goes before what has not begun: see `CooperativeEngine._priority`.
    theirs.setdefault("scheduling-policy", "priority")
    arguments = HttpLayer().parse(theirs, fixed=ours)
    if arguments.scheduling_policy != "priority":
        raise ConfigError("vllm's scheduling-policy must be priority: continuations go first")
    return arguments


async def _serve(config: ServeConfig, router: RouterCheckpoint | None, student: Path) -> int:
    reserved = _reserved_rows(router, student)
    arguments = _vllm_arguments(config, student, reserved, router)
    tenants = None if config.tenants is None else Tenants(config.tenants)
    deadline = time.monotonic() + config.teacher_wait
    async with _teacher(config, reserved) as teacher:
        if not config.teacher_wait:
            await teacher.connect()  # the engine takes a while: say at once what is missing
        http = HttpLayer()
        http.prepare(arguments)
        address, socket = http.listen(arguments)
        engine = _engine(arguments)
        try:
            await _connect(teacher, deadline)
            await teacher.check_vocabulary(SameVocabulary(engine.renderer.tokenizer, reserved.start))
            cooperation = _cooperation(config, router, reserved, teacher, engine)
            engine.cooperation = replace(cooperation, parsers=parses_streams(arguments))
            app = await _app(config, engine, tenants, arguments, http)
            # In front of everything; vLLM has built its stack of middlewares already.
            lifecycle = Lifecycle(Traces(app.middleware_stack), drain_seconds=config.drain_seconds)
            app.middleware_stack = RequestIds(lifecycle)
            shared = engine.cooperation.shared
            works = [shared.steer(), teacher.watch(config.teacher_probe)]
            works += [] if tenants is None else [tenants.watch()]
            works += [] if config.router is None else [_router_reload(config, router, engine).watch()]
            async with aclosing(shared), _background(works):  # at the end, every span is settled
                print(f"wheels serve: {address}, teacher {teacher}", flush=True)
                options = http.serve_options(arguments, keep_alive_seconds=KEEP_ALIVE_SECONDS)
                serving = http.serve_http(
                    app, sock=socket, timeout_graceful_shutdown=CUT_OFF_SECONDS, **options
                )
                await lifecycle.run(app.state, serving)
            if engine.errored and not lifecycle.interrupted:
                raise EngineDied("the student's engine died; what it said last is above")
        finally:
            engine.shutdown()
            socket.close()
    if lifecycle.cut_off:
        print(f"wheels serve: requests that were cut off: {lifecycle.cut_off}", flush=True)
    return 1 if lifecycle.cut_off else 0


def _teacher(config: ServeConfig, reserved: ReservedRows) -> TeacherPool:
    key = config.teacher_api_key
    replicas = [
        Teacher(
            str(url),
            model=config.teacher_model,
            api_key=key.get_secret_value() if key else None,
            timeout=config.teacher_timeout,
            span_timeout=config.span_timeout,
            breaker=Breaker(config.breaker_failures, config.breaker_seconds),
            vocabulary=reserved.start,
        )
        for url in config.teacher
    ]
    return TeacherPool(replicas, concurrency=config.teacher_concurrency, queue_seconds=config.teacher_queue)


def _engine(arguments: Namespace) -> CooperativeEngine:
    # What vLLM's own server passes: its defaults for batches depend on it.
    usage = UsageContext.OPENAI_API_SERVER
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(usage)
    if config.use_v2_model_runner:  # vLLM's choice on GPUs, known only now; it takes its own interface alone
        config.model_config.logits_processors = ["server.gate_processor:GateProcessorV2"]
    return CooperativeEngine.from_vllm_config(
        config,
        usage_context=usage,
        disable_log_stats=arguments.disable_log_stats,
        enable_log_requests=arguments.enable_log_requests,
        aggregate_engine_logging=arguments.aggregate_engine_logging,
    )


async def _connect(teacher: TeacherPool, deadline: float) -> None:
    """Connect, trying again until the deadline while the teacher is not up yet."""
    while True:
        try:
            return await teacher.connect()
        except TeacherError as error:
            if error.reason not in ("unreachable", "timeout") or time.monotonic() >= deadline:
                raise
            await asyncio.sleep(0.5)


def _cooperation(
    config: ServeConfig,
    router: RouterCheckpoint | None,
    reserved: ReservedRows,
    teacher: TeacherPool,
    engine: CooperativeEngine,
) -> Cooperation:
    policy = _policy(config, router, engine.model_config.max_model_len)
    _publish_price(config, policy)
    span_tokens, ask_tokens = _spans(config, router)
    return Cooperation(
        teacher=teacher,
        policy=policy,
        reserved=reserved,
        span_tokens=span_tokens,
        ask_tokens=ask_tokens,
        client_priority=config.vllm_settings.get("scheduling-policy") == "priority",
        default_budget=config.default_budget,
        shared=SharedBudgets(
            config.ledger.build(), PriceController(policy.calibration, ask_tokens), config.limits
        ),
        on_teacher_error=config.on_teacher_error,
    )


def _router_reload(config: ServeConfig, router: RouterCheckpoint, engine: CooperativeEngine) -> RouterReload:
    async def use(new: RouterCheckpoint) -> None:
        try:
            policy = _policy(config, new, engine.model_config.max_model_len)
            span_tokens, ask_tokens = _spans(config, new)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        await engine.collective_rpc("load_router", args=(str(config.router.resolve()),))
        engine.cooperation.shared.prices.calibrate(policy.calibration, ask_tokens)
        engine.cooperation = replace(
            engine.cooperation, policy=policy, span_tokens=span_tokens, ask_tokens=ask_tokens
        )
        _publish_price(config, policy)

    return RouterReload(config.router, config.student, router, use)


def _publish_price(config: ServeConfig, policy: Policy) -> None:
    if config.default_budget.fraction is not None:
        PRICE.set(policy.calibration.price(config.default_budget.fraction))


async def _app(
    config: ServeConfig,
    engine: CooperativeEngine,
    tenants: Tenants | None,
    arguments: Namespace,
    http: HttpLayer,
) -> FastAPI:
    tasks = await engine.get_supported_tasks()
    app = http.build_app(arguments, tasks, engine.model_config)
    app.include_router(routes(config.examples, tenants))
    metrics_key = config.metrics_api_key
    if tenants is not None or metrics_key is not None:
        # vLLM has built its stack of middlewares already: keys are asked for before all of it.
        app.middleware_stack = Access(
            app.middleware_stack,
            tenants,
            engine.cooperation.shared.ledger,
            metrics_key=None if metrics_key is None else metrics_key.get_secret_value(),
        )
    document(app)
    await http.init_app_state(engine, app.state, arguments, tasks)
    return app


@asynccontextmanager
async def _background(works: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """What goes on beside the requests."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(_report_death)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def _report_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        logger.critical("%s ended: restart the gateway", task.get_coro(), exc_info=task.exception())
