"""Another router without a restart: when it is taken, and how it gets into the engine."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from router.checkpoint import CheckpointError, RouterCheckpoint
from router.controller import PriceController
from router.ledger import FractionOfTraffic, Scope, Status
from router.policy import Calibration
from server.gate_processor import PROCESSORS, GateProcessor, RouterLoader, gate_settings, write_taps
from server.reload import RouterReload
from server.vllm_api import Sampler

CPU = torch.device("cpu")


@pytest.fixture
def other(router: RouterCheckpoint) -> RouterCheckpoint:
    """Asks for half as much, and looks elsewhere."""
    calibration = {"learned": [(0.1, 2.0), (0.3, 1.0)]}
    return replace(
        router, taps=-router.taps, config=router.config.model_copy(update={"calibration": calibration})
    )


class Reloads:
    """A directory with a router, its watcher, and all that was put to use."""

    def __init__(self, directory: Path, router: RouterCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(RouterCheckpoint, "check_student", lambda *_: None)
        self.directory, self.used = directory, []
        self.refuses: Exception | None = None
        self.tried = asyncio.Event()
        router.save(directory)
        self.watcher = RouterReload(directory, Path("student"), router, self.use)

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


async def test_the_same_router_again_is_nothing_new(reloads, router):
    assert not await reloads.after(router)
    assert reloads.used == []


async def test_a_directory_that_is_away_for_a_moment_is_nothing_new(reloads, other):
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


async def test_whatever_goes_wrong_the_next_one_is_taken(reloads, other):
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


async def test_what_could_not_be_used_does_not_count_as_running(reloads, other):
    reloads.refuses = CheckpointError("no calibration")
    with pytest.raises(CheckpointError, match="no calibration"):
        await reloads.after(other)
    reloads.refuses = None
    assert await reloads.after(other)


# In the engine's process


def output_matrix(first: int, rows: int, **more: object) -> SimpleNamespace:
    """vLLM's, of which this process has `rows` rows from `first` on."""
    indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=first + rows)
    return SimpleNamespace(weight=torch.zeros(rows, 4), shard_indices=indices, **more)


def test_taps_go_into_their_rows(router):
    whole = output_matrix(0, 14)
    write_taps(whole, router)
    assert torch.equal(whole.weight[11:], router.taps)
    assert not whole.weight[:11].any()


def test_a_part_of_the_matrix_takes_its_part_of_the_taps(router):
    """Two processes: rows 0 to 11 and 12 to 23, of which the last ten are padding."""
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


def test_the_worker_takes_taps_and_gate(router, reserved, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "compute_logprobs", Sampler.__dict__["compute_logprobs"])
    router.save(tmp_path)
    config = SimpleNamespace(
        additional_config=gate_settings(reserved, "learned", tmp_path),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
    )
    processor = GateProcessor(config, CPU, False)
    assert processor in PROCESSORS
    lm_head = output_matrix(0, 14)
    worker = SimpleNamespace(vllm_config=config, get_model=lambda: SimpleNamespace(lm_head=lm_head))
    shifted = {**router.gate, "mlp.4.bias": router.gate["mlp.4.bias"] + 3.0}
    replace(router, gate=shifted, taps=2 * router.taps).save(tmp_path)
    logits = torch.zeros(1, 14)
    before = processor.gate(logits).item()
    RouterLoader.load_router(worker, str(tmp_path))
    assert processor.gate(logits).item() == pytest.approx(before + 3.0)
    assert torch.equal(lm_head.weight[11:], 2 * router.taps)


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
