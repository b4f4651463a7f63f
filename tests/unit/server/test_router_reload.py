"""Another router without a restart: checks before it is taken, and its way into the engine."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from vllm.model_executor.models.utils import PPMissingLayer

from router.adaptive import AdaptiveCalibration
from router.checkpoint import CheckpointError, RouterCheckpoint
from router.controller import PriceController
from router.ledger import FractionOfTraffic, Scope, Status
from router.policy import Calibration
from router.reserved import ReservedRows
from server import gateway as gateway_module
from server.config import ServeConfig
from server.cooperation import Cooperation
from server.gate_processor import GateProcessor, gate_settings
from server.gateway import _router_reload
from server.price_follower import PriceFollower
from server.router_loader import RouterLoader, write_taps
from server.router_reload import RouterReload, load_everywhere
from server.served_pair import ServedPair, Spans
from server.vllm_api import find_reports
from tests.helpers.one_teacher import one_teacher

CPU = torch.device("cpu")


@pytest.fixture
def other(router: RouterCheckpoint) -> RouterCheckpoint:
    """A router with other taps and other prices."""
    calibration = {"learned": [(0.1, 2.0), (0.3, 1.0)]}
    return replace(
        router, taps=-router.taps, config=router.config.model_copy(update={"calibration": calibration})
    )


class Reloads:
    """A directory with a router, its watcher, and all routers that were put to use."""

    def __init__(self, directory: Path, router: RouterCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(RouterCheckpoint, "check_student", lambda *_: None)
        self.directory, self.used = directory, []
        self.refuses: Exception | None = None
        self.tried = asyncio.Event()
        router.save(directory)
        self.watcher = RouterReload(directory, Path("student"), router, router.reserved, self.use)

    async def use(self, router: RouterCheckpoint) -> None:
        self.tried.set()
        if self.refuses:
            raise self.refuses
        self.used.append(router.digest())

    def replace(self, router: RouterCheckpoint) -> None:
        """Put another router in the old one's place, by one rename."""
        beside = self.directory.with_name("new")
        router.save(beside)
        os.replace(self.directory, self.directory.with_name(f"old{len(os.listdir(beside.parent))}"))
        os.replace(beside, self.directory)

    async def after(self, router: RouterCheckpoint) -> bool:
        self.replace(router)
        return await self.watcher.reload()


@pytest.fixture
def reloads(router, tmp_path, monkeypatch) -> Reloads:
    return Reloads(tmp_path / "router", router, monkeypatch)


async def test_a_new_router_is_used_once(reloads, router, other):
    assert not await reloads.watcher.reload()
    assert await reloads.after(other)
    assert reloads.used == [other.digest()]
    assert not await reloads.watcher.reload()
    assert await reloads.after(router), "and back"
    assert reloads.used == [other.digest(), router.digest()]


async def test_the_same_router_is_not_taken_again(reloads, router):
    assert not await reloads.after(router)
    assert reloads.used == []


async def test_a_directory_that_is_missing_for_a_moment_changes_nothing(reloads, other):
    os.replace(reloads.directory, reloads.directory.with_name("away"))
    assert not await reloads.watcher.reload()
    other.save(reloads.directory)
    assert await reloads.watcher.reload()


async def test_an_unusable_router_is_refused_and_the_next_one_is_taken(reloads, router, other, reserved):
    moved = router.config.model_copy(update={"reserved_start": reserved.start - 1})
    with pytest.raises(CheckpointError, match="reserved rows"):
        await reloads.after(replace(router, config=moved))
    (reloads.directory / "router.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"router\.json"):
        await reloads.watcher.reload()
    assert not await reloads.watcher.reload(), "refused once, not at every look"
    assert await reloads.after(other)
    assert reloads.used == [other.digest()]


async def test_a_router_for_another_student_is_refused(reloads, router, other, monkeypatch):
    def refuse(*_: object) -> None:
        raise CheckpointError("trained for another student")

    monkeypatch.setattr(RouterCheckpoint, "check_student", refuse)
    with pytest.raises(CheckpointError, match="another student"):
        await reloads.after(other)
    assert reloads.used == []


async def test_the_next_router_is_taken_after_any_fault(reloads, other):
    reloads.refuses = RuntimeError("the engine's process says no")
    watching = asyncio.create_task(reloads.watcher.watch(0.01))
    reloads.replace(other)
    await reloads.tried.wait()
    assert reloads.used == []
    reloads.refuses = None
    reloads.tried.clear()
    reloads.replace(replace(other, taps=other.taps * 2))
    await reloads.tried.wait()
    assert len(reloads.used) == 1
    watching.cancel()


async def test_an_unusable_router_does_not_count_as_running(reloads, other):
    reloads.refuses = CheckpointError("no calibration")
    with pytest.raises(CheckpointError, match="no calibration"):
        await reloads.after(other)
    reloads.refuses = None
    assert await reloads.after(other)


# In the engine's process


def output_matrix(first: int, rows: int, **more: object) -> SimpleNamespace:
    """vLLM's output matrix, of which this process has `rows` rows from `first` on."""
    indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=first + rows)
    return SimpleNamespace(weight=torch.zeros(rows, 4), shard_indices=indices, **more)


def test_taps_go_into_their_rows(router):
    whole = output_matrix(0, 14)
    write_taps(whole, router)
    assert torch.equal(whole.weight[11:], router.taps)
    assert not whole.weight[:11].any()


def test_a_part_of_the_matrix_takes_its_part_of_the_taps(router):
    """Two processes have rows 0 to 11 and 12 to 23. The last ten rows are padding."""
    parts = output_matrix(0, 12), output_matrix(12, 12)
    for part in parts:
        write_taps(part, router)
    assert torch.equal(parts[0].weight[11], router.taps[0])
    assert not parts[0].weight[:11].any()
    assert torch.equal(parts[1].weight[:2], router.taps[1:])
    assert not parts[1].weight[2:].any()


def test_a_copy_for_the_cpus_kernels_is_made_again(router):
    packed = []
    method = SimpleNamespace(process_weights_after_loading=lambda layer: packed.append(layer.weight.clone()))
    write_taps(output_matrix(0, 14, cpu_linear=None, quant_method=method), router)
    assert torch.equal(packed[0][11:], router.taps)


class Worker(RouterLoader):
    """One process of the engine, with a part of the output matrix or none, and a gate."""

    def __init__(self, directory: Path | None, reserved: ReservedRows, output: object) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config=gate_settings(
                reserved, "entropy" if directory is None else "learned", directory, sketch=True
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=2),
        )
        self.processor = GateProcessor(self.vllm_config, CPU, False)
        self.output = output

    def get_model(self) -> SimpleNamespace:
        return SimpleNamespace(lm_head=self.output)

    @property
    def score(self) -> float:
        return self.processor.gate(torch.zeros(1, 14)).item()


class Engine:
    """An engine whose `collective_rpc` calls its workers in turn, as vLLM's does."""

    def __init__(self, *workers: Worker) -> None:
        self.workers = workers

    async def collective_rpc(self, method: str, args: tuple[object, ...]) -> list[object]:
        return [getattr(worker, method)(*args) for worker in self.workers]


@pytest.fixture
def engine(router, reserved, tmp_path, monkeypatch) -> Engine:
    """Two stages of a pipeline: the first has no output matrix."""
    for report in find_reports(v2=False):
        monkeypatch.setattr(report.owner, report.name, vars(report.owner)[report.name])
    router.save(tmp_path)
    stages = PPMissingLayer(), output_matrix(0, 14)
    return Engine(*(Worker(tmp_path, reserved, output) for output in stages))


def shifted(router: RouterCheckpoint, by: float) -> RouterCheckpoint:
    gate = {**router.gate, "mlp.4.bias": router.gate["mlp.4.bias"] + by}
    return replace(router, gate=gate, taps=2 * router.taps)


async def test_every_process_takes_taps_and_gate(engine, router, tmp_path):
    new = shifted(router, 3.0)
    new.save(tmp_path)
    before = [worker.score for worker in engine.workers]
    await load_everywhere(engine.collective_rpc, tmp_path, new, "learned")
    assert [worker.score for worker in engine.workers] == pytest.approx([score + 3.0 for score in before])
    assert torch.equal(engine.workers[1].output.weight[11:], new.taps)


async def test_an_engine_that_began_with_an_untrained_gate_takes_the_learned_one(engine, router, tmp_path):
    worker = Worker(None, router.reserved, output_matrix(0, 14))
    worker.processor.sketch.add(torch.ones(5))
    assert worker.processor.sketch.read().positions == 5
    await load_everywhere(Engine(worker).collective_rpc, tmp_path, router, "learned")
    assert worker.score == pytest.approx(engine.workers[0].score)
    assert torch.equal(worker.output.weight[11:], router.taps)
    assert worker.processor.sketch.read().positions == 0, "what was seen are another gate's scores"


async def test_a_process_that_refuses_keeps_all_others_from_it(engine, router, tmp_path):
    """The first rank can take the router, and the last one has a quantised matrix."""
    engine.workers[1].output.weight = torch.zeros(14, 4, dtype=torch.int8)
    engine.workers = (Worker(tmp_path, router.reserved, output_matrix(0, 14)), *engine.workers)
    new = shifted(router, 3.0)
    new.save(tmp_path)
    before = [worker.score for worker in engine.workers]
    with pytest.raises(CheckpointError, match="the output matrix is quantised"):
        await load_everywhere(engine.collective_rpc, tmp_path, new, "learned")
    assert [worker.score for worker in engine.workers] == before
    assert not engine.workers[0].output.weight.any()


async def test_a_router_that_changed_while_it_was_read_is_left_for_the_next_look(engine, router, tmp_path):
    read, written = shifted(router, 1.0), shifted(router, 2.0)
    written.save(tmp_path)
    before = [worker.score for worker in engine.workers]
    with pytest.raises(CheckpointError, match="replaced while the gateway read it"):
        await load_everywhere(engine.collective_rpc, tmp_path, read, "learned")
    assert [worker.score for worker in engine.workers] == before


async def test_a_router_is_taken_as_it_was_checked(engine, router, tmp_path):
    new = shifted(router, 3.0)
    new.save(tmp_path)
    worker = engine.workers[1]
    before = worker.score
    worker.prepare_router(str(tmp_path))
    shifted(router, 9.0).save(tmp_path)
    worker.load_router(str(tmp_path), "learned")
    assert worker.score == pytest.approx(before + 3.0)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (SimpleNamespace(weight=torch.zeros(14, 4, dtype=torch.int8)), "the output matrix is quantised"),
        (SimpleNamespace(qweight=torch.zeros(1)), "the output matrix is quantised"),
        (SimpleNamespace(weight=torch.zeros(14, 5)), r"the output matrix is \(14, 5\), the taps are 4 wide"),
        (None, "SimpleNamespace computes its logits in a way that the gate cannot read"),
    ],
)
def test_a_model_that_takes_no_taps_is_known_at_the_start(engine, output, said):
    worker = engine.workers[1]
    worker.check_router(4)
    worker.output = output
    with pytest.raises(CheckpointError, match=said):
        worker.check_router(4)


def test_the_price_controller_keeps_what_it_learned():
    limit = FractionOfTraffic(fraction=0.2, window_seconds=3600)
    scope = Scope("global", "", limit)
    prices = PriceController(Calibration(((0.1, 4.0), (0.3, 2.0))), 4)
    prices.update(0.0, [Status(scope, 0, 0, 0, 0, 0, 0.0, 0.0)])
    prices.update(9.0, [Status(scope, 900, 0, 100, 900, 100, 0.0, 0.0)])
    rate, price = prices.rate([scope]), prices.price([scope])
    assert rate == pytest.approx(0.1188, abs=1e-3), "driven down from 0.2"
    prices.calibrate(Calibration(((0.1, 2.0), (0.3, 1.0))), 8)
    assert prices.rate([scope]) == rate
    assert prices.price([scope]) == pytest.approx(price / 2)
    prices.calibrate(Calibration(((0.15, 2.0), (0.3, 1.0))), 8)
    assert prices.rate([scope]) == 0.15


# In the gateway


class Gateway:
    """An engine and the parts of its cooperation that another router changes."""

    def __init__(self, directory: Path, router: RouterCheckpoint) -> None:
        settings = {"student": directory, "teacher": "http://t", "router": directory}
        config = ServeConfig.model_validate(settings)
        self.pair = ServedPair(config, directory, router, router.reserved, 10, Spans(4, 4))
        self.calls: list[str] = []
        self.refuses = ""
        self.model_config = SimpleNamespace(max_model_len=400, get_hidden_size=lambda: 4)
        self.cooperation = Cooperation(
            teachers=one_teacher(None),
            policy=self.pair.policy(400),
            reserved=router.reserved,
            span_tokens=4,
            ask_tokens=4,
            default_budget=config.default_budget,
            shared=SimpleNamespace(prices=PriceController(router.calibration(), 4)),
        )

    async def collective_rpc(self, method: str, args: tuple[object, ...]) -> list[object]:
        if method == self.refuses:
            raise RuntimeError("the output matrix is quantised")
        self.calls.append(method)
        return [RouterCheckpoint.load(Path(args[0])).digest()] if method == "prepare_router" else [None]


async def test_the_gateway_takes_spans_and_policy_of_another_router(router, other, tmp_path):
    router.save(tmp_path)
    gateway = Gateway(tmp_path, router)
    reload = await _router_reload(gateway.pair, gateway, None)
    longer = replace(other, config=other.config.model_copy(update={"span_tokens": 8, "ask_tokens": 2}))
    longer.save(tmp_path)
    await reload._use(longer)
    assert gateway.calls == ["check_router", "prepare_router", "load_router"]
    assert (gateway.cooperation.span_tokens, gateway.cooperation.ask_tokens) == (8, 2)
    assert gateway.cooperation.policy.calibration == other.calibration()


async def test_a_gateway_without_a_router_begins_with_one_that_comes_later(
    router, reserved, tmp_path, monkeypatch
):
    """First comes a router whose prices are learned, then one with measured prices, then the first again."""
    monkeypatch.setattr(RouterCheckpoint, "check_student", lambda *_: None)
    directory = tmp_path / "router"
    directory.mkdir()
    gateway = Gateway(directory, router)
    gateway.pair = replace(gateway.pair, student=tmp_path, router=None)
    save_file({"lm_head.weight": torch.zeros(14, 4)}, tmp_path / "model.safetensors")
    first = AdaptiveCalibration("entropy", 4)
    gateway.cooperation = replace(gateway.cooperation, policy=gateway.pair.policy(400), router=None)
    follower = PriceFollower(first, gateway.collective_rpc, gateway.pair.price_file)
    reload = await _router_reload(gateway.pair, gateway, follower)
    assert not await reload.reload()
    unmeasured = replace(router, config=router.config.model_copy(update={"calibration": {}}))
    unmeasured.save(directory)
    assert await reload.reload()
    learned = gateway.cooperation.policy.calibration
    assert (learned.gate, gateway.cooperation.router) == ("learned", unmeasured.digest())
    router.save(directory)
    assert await reload.reload()
    assert gateway.cooperation.policy.calibration == router.calibration()
    unmeasured.save(directory)
    assert await reload.reload()
    assert gateway.cooperation.policy.calibration is learned, "it goes on with what it has learned"


async def test_a_router_that_the_engine_refuses_changes_nothing_in_the_gateway(router, other, tmp_path):
    router.save(tmp_path)
    gateway = Gateway(tmp_path, router)
    reload, before = await _router_reload(gateway.pair, gateway, None), gateway.cooperation
    gateway.refuses = "prepare_router"
    with pytest.raises(RuntimeError, match="quantised"):
        await reload._use(other)
    assert gateway.cooperation is before
    assert gateway.calls == ["check_router"]


async def test_a_student_that_takes_no_taps_is_served_without_following_its_router(
    router, tmp_path, monkeypatch
):
    said: list[str] = []
    monkeypatch.setattr(gateway_module.logger, "warning", lambda text, *values: said.append(text % values))
    router.save(tmp_path)
    gateway = Gateway(tmp_path, router)
    gateway.refuses = "check_router"
    assert await _router_reload(gateway.pair, gateway, None) is None
    assert said == [
        "new routers need a restart, because their directory is not watched: the output matrix is quantised"
    ]
