"""Assembles the gateway from its configuration, and runs it."""

import asyncio
import json
import logging
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import uvloop
from fastapi import FastAPI

from router.adaptive import AdaptiveCalibration
from router.checkpoint import RouterCheckpoint
from router.controller import PriceController
from router.policy import Policy
from server.config import ConfigError, ServeConfig
from server.cooperation import Cooperation
from server.engine import CooperativeEngine
from server.exchange import EXCHANGE
from server.grammar.manager import install_scheduler
from server.http.access import Access
from server.http.fields import TeacherFields
from server.http.lifecycle import CUT_OFF_SECONDS, KEEP_ALIVE_SECONDS, EngineDied, Lifecycle
from server.http.openapi import document
from server.http.request_id import RequestIds, log_with_ids
from server.http.routes import routes
from server.http.tracing import Traces
from server.metrics import PRICE
from server.original_prompt import OriginalPrompt
from server.price_follower import PriceFollower
from server.recorder import Recorder
from server.router_reload import RouterReload, load_everywhere
from server.served_pair import ServedPair
from server.sessions import SessionLimits
from server.shared_budgets import SharedBudgets
from server.teacher.teachers import Teachers
from server.teachers_start import build_teachers, introduce
from server.tenants import Tenants
from server.vllm_api import (
    AsyncEngineArgs,
    HttpLayer,
    UsageContext,
    answer_by_name,
    check_speculation,
    current_platform,
    find_reports,
    keep_originals,
    parses_streams,
    wrap_app,
)
from server.vllm_arguments import one_line

logger = logging.getLogger(__name__)


def run(config: ServeConfig) -> int:
    """Serve until a signal; returns the exit status, which is 1 if requests were cut off.

    Raises:
        ConfigError, CheckpointError, TeacherError: the gateway cannot start; the message is one line.
        EngineDied: the student's engine died.
    """
    log_with_ids()
    return uvloop.run(_serve(config, ServedPair.of(config)))


def _vllm_arguments(config: ServeConfig, pair: ServedPair) -> Namespace:
    """The server arguments of vLLM, parsed and checked by vLLM's own parser."""
    ours: dict[str, Any] = {
        "model": str(pair.student),
        "served-model-name": [config.served_model_name],
        "host": config.host,
        "port": config.port,
        "middleware": f"{TeacherFields.__module__}.{TeacherFields.__name__}",
        "logits-processors": "server.gate_processor:GateProcessor",
        "worker-extension-cls": "server.router_loader.RouterLoader",
        "additional-config": json.dumps(pair.gate_settings()),
    }
    theirs = config.vllm_settings
    if config.tenants is not None and "api-key" in theirs:
        raise ConfigError("leave out vllm's api-key: tenants have their own API keys")
    if current_platform.is_cpu():
        # The CPU default of 128 would recompute whole short prompts after every span.
        theirs.setdefault("block-size", 32)
    # Running completions go before new requests: see `Cooperator._priority`.
    theirs.setdefault("scheduling-policy", "priority")
    arguments = HttpLayer().parse(theirs, fixed=ours)
    if arguments.scheduling_policy != "priority":
        raise ConfigError("vllm's scheduling-policy must be priority, so that continuations go first")
    adapters = {adapter.name for adapter in arguments.lora_modules or ()}
    arguments.served_model_name += [name for name in config.models if name not in adapters]
    return arguments


async def _serve(config: ServeConfig, pair: ServedPair) -> int:
    arguments = _vllm_arguments(config, pair)
    tenants = _tenants(config)
    deadline = time.monotonic() + config.teacher_wait
    async with build_teachers(config, pair.visible) as teachers:
        if not config.teacher_wait:
            await teachers.connect()  # before the slow engine: reports a missing teacher at once
        http = HttpLayer()
        http.prepare(arguments)
        address, socket = http.listen(arguments)
        engine = _engine(arguments)
        try:
            await teachers.connect(deadline)
            await introduce(teachers, config, engine.renderer.get_tokenizer(), pair.reserved.start)
            cooperation = _cooperation(config, pair, teachers, engine)
            engine.cooperation = replace(cooperation, parsers=parses_streams(arguments))
            app = await _app(config, engine, tenants, arguments, http)
            lifecycle = wrap_app(
                app, lambda stack: Lifecycle(Traces(stack), drain_seconds=config.drain_seconds)
            )
            wrap_app(app, RequestIds)
            shared = engine.cooperation.shared
            works = [shared.steer(), teachers.watch(config.teacher_probe)]
            works += [] if tenants is None else [tenants.watch()]
            follower = _price_follower(pair, engine)
            if follower is not None:
                works.append(follower.follow())
            if (reload := await _router_reload(pair, engine, follower)) is not None:
                works.append(reload.watch())
            async with aclosing(shared), _background(works):  # at the end, every span is settled
                print(f"wheels serve: {address}, {teachers}", flush=True)
                options = http.serve_options(arguments, keep_alive_seconds=KEEP_ALIVE_SECONDS)
                serving = http.serve_http(
                    app, sock=socket, timeout_graceful_shutdown=CUT_OFF_SECONDS, **options
                )
                await lifecycle.run(app.state, serving)
            if engine.errored and not lifecycle.interrupted:
                raise EngineDied("the student's engine died; its last output is above")
        finally:
            engine.shutdown()
            socket.close()
    if lifecycle.cut_off:
        print(f"wheels serve: requests cut off: {lifecycle.cut_off}", flush=True)
    return 1 if lifecycle.cut_off else 0


def _tenants(config: ServeConfig) -> Tenants | None:
    if config.tenants is None:
        return None
    return Tenants(config.tenants, priced=config.prices is not None, teachers=config.teachers)


def _engine(arguments: Namespace) -> CooperativeEngine:
    # vLLM's own server passes this too: vLLM's defaults for batches depend on it.
    usage = UsageContext.OPENAI_API_SERVER
    try:
        config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(usage)
    except ValueError as error:
        raise ConfigError(f"vllm: {one_line(error)}") from error
    check_speculation(config)
    find_reports(v2=config.use_v2_model_runner)
    if config.use_v2_model_runner:  # vLLM's choice on GPUs; this runner takes only its own interface
        config.model_config.logits_processors = ["server.gate_processor:GateProcessorV2"]
    install_scheduler(config)
    engine = CooperativeEngine.from_vllm_config(
        config,
        usage_context=usage,
        disable_log_stats=arguments.disable_log_stats,
        enable_log_requests=arguments.enable_log_requests,
        aggregate_engine_logging=arguments.aggregate_engine_logging,
    )
    return cast(CooperativeEngine, engine)


def _cooperation(
    config: ServeConfig, pair: ServedPair, teachers: Teachers, engine: CooperativeEngine
) -> Cooperation:
    policy = pair.policy(engine.model_config.max_model_len)
    _publish_price(config, policy)
    return Cooperation(
        teachers=teachers,
        policy=policy,
        reserved=pair.reserved,
        span_tokens=pair.spans.span_tokens,
        ask_tokens=pair.spans.ask_tokens,
        router=None if pair.router is None else pair.router.digest(),
        client_priority=config.vllm_settings.get("scheduling-policy") == "priority",
        default_budget=config.default_budget,
        models=config.models,
        prices=config.prices,
        shared=SharedBudgets(
            config.ledger.build(),
            PriceController(policy.calibration, pair.spans.ask_tokens),
            config.limits,
            sessions=SessionLimits(config.session_seconds, config.most_sessions),
        ),
        on_teacher_error=config.on_teacher_error,
        recorder=_recorder(config),
        words=pair.words,
    )


def _recorder(config: ServeConfig) -> Recorder | None:
    """The recorder; None if nothing is to be recorded. Raises ConfigError if it cannot write."""
    if config.record is None:
        return None
    try:
        return Recorder(config.record, config.record_share, config.record_megabytes * 1_000_000)
    except OSError as error:
        raise ConfigError(f"record: {error}") from error


async def _router_reload(
    pair: ServedPair, engine: CooperativeEngine, follower: PriceFollower | None
) -> RouterReload | None:
    """The watch on the configured router; None without one, or if the running student cannot take another.

    ``follower``: the follower of learned prices; None if no price is learned.
    """
    config = pair.config
    directory = config.router
    if directory is None:
        return None
    if pair.router is None:
        logger.info("no router in %s yet: using the gate %s until one appears", directory, pair.gate)
    try:
        await engine.collective_rpc("check_router", args=(engine.model_config.get_hidden_size(),))
    except Exception as error:  # of any kind: it comes from the engine's processes as text
        logger.warning("new routers need a restart, because their directory is not watched: %s", error)
        return None

    async def use(new: RouterCheckpoint) -> None:
        changed = pair.with_router(new)
        policy = changed.checked_policy(engine.model_config.max_model_len)
        await load_everywhere(engine.collective_rpc, directory.resolve(), new, changed.gate)
        if isinstance(policy.calibration, AdaptiveCalibration) and follower is not None:
            learned = follower.switch(policy.calibration, changed.price_file)
            policy = replace(policy, calibration=learned)
        ask_tokens = changed.spans.ask_tokens
        engine.cooperation.shared.prices.calibrate(policy.calibration, ask_tokens)
        engine.cooperation = replace(
            engine.cooperation,
            policy=policy,
            span_tokens=changed.spans.span_tokens,
            ask_tokens=ask_tokens,
            words=changed.words,
            router=new.digest(),
        )
        _publish_price(config, policy)

    return RouterReload(directory, config.student, pair.router, pair.reserved, use)


def _price_follower(pair: ServedPair, engine: CooperativeEngine) -> PriceFollower | None:
    """The follower that keeps a learned price up to date; None if the price is measured or fixed."""
    calibration = engine.cooperation.policy.calibration
    if not isinstance(calibration, AdaptiveCalibration):
        return None
    return PriceFollower(calibration, engine.collective_rpc, pair.price_file)


def _publish_price(config: ServeConfig, policy: Policy) -> None:
    if config.default_budget.fraction is not None:
        fraction = config.default_budget.fraction
        PRICE.set_function(lambda: policy.calibration.price(fraction))


async def _app(
    config: ServeConfig,
    engine: CooperativeEngine,
    tenants: Tenants | None,
    arguments: Namespace,
    http: HttpLayer,
) -> FastAPI:
    tasks = await engine.get_supported_tasks()
    if "generate" not in tasks:
        kind = ", ".join(engine.model_config.architectures)
        raise ConfigError(f"student: vLLM cannot generate text with a model of type {kind}")
    app = http.build_app(arguments, tasks, engine.model_config)
    app.include_router(routes(config.examples, tenants))
    metrics_key = config.metrics_api_key
    if tenants is not None or metrics_key is not None:
        access = partial(
            Access,
            tenants=tenants,
            ledger=engine.cooperation.shared.ledger,
            metrics_key=None if metrics_key is None else metrics_key.get_secret_value(),
        )
        wrap_app(app, access)
    document(app, engine.cooperation.teachers.names)
    try:
        await http.init_app_state(engine, app.state, arguments, tasks)
    except ValueError as error:  # an adapter that cannot be loaded
        raise ConfigError(f"vllm: {one_line(error)}") from error
    template = app.state.online_renderer.chat_template
    keep_originals(engine.renderer, template, _note_original, lambda: engine.cooperation.wants_originals)
    answer_by_name(app.state, _model_of_request)
    return app


def _note_original(prompt: Any, original: OriginalPrompt) -> None:
    exchange = EXCHANGE.get(None)
    if exchange is not None:
        exchange.originals.append((prompt, original))


def _model_of_request() -> str:
    exchange = EXCHANGE.get(None)
    return "" if exchange is None else exchange.model


@asynccontextmanager
async def _background(works: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run coroutines next to the requests, until the end of the block."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(_report_death)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CUT_OFF_SECONDS)  # so that learned prices are saved


def _report_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        logger.critical("%s ended: restart the gateway", task.get_coro(), exc_info=task.exception())
