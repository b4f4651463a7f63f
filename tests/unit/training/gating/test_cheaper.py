"""Several teachers: the dearest judges the others, and the gate learns whom to ask.

After a quarter of the tokens no teacher is needed, after a quarter any teacher helps, and after a quarter
only the big one. After the other tokens the small teacher is wrong and the student is right. A wrong token
loses 4 nats.
"""

import math

import pytest
import torch

from router.budget import Bucket, Budget
from router.gate import EntropyGate, RandomGate, TeachersGate
from tests.helpers.table_models import NATS, model_of
from tests.helpers.tiny_models import END, RESERVED, VISIBLE
from training.evaluation.scoring import relative_cost
from training.gate_config import GateConfig, PriceConditioning, RatioGain, RegretGain
from training.gating.calibration import price_at_rate, teacher_rate
from training.gating.head import Head
from training.gating.lessons import collect, token_gain
from training.gating.prompts import Prompts
from training.gating.rollout import FREE, ClosedLoop, Draft, Request, Rollout, with_gate
from training.gating.rounds import Rounds
from training.gating.tree import Alone, Setting, Tree, ends

FIRST = 2  # models write no ids below it
WORDS = range(FIRST, VISIBLE)
EASY, CHEAP, DEAR, MISLED = range(4)
COSTS = [0.25, 1.0]
SMALL, BIG = range(2)
CONFIG = GateConfig(
    span_tokens=1,
    ask_tokens=1,
    gain=RegretGain(type="regret"),
    conditioning=PriceConditioning(rate=0.3),
    rounds=2,
    prompts=60,
    epochs=30,
    batch=128,
)


def kind(token: int) -> int:
    return token % 4


def after(token: int, steps: int) -> int:
    return FIRST + (token - FIRST + steps) % len(WORDS)


def table(*wrong: int) -> dict[int, int]:
    """A table that is right after all tokens except those of these kinds."""
    return {token: after(token, 11 if kind(token) in wrong else 7) for token in WORDS}


@pytest.fixture(scope="module")
def trio() -> ClosedLoop:
    return ClosedLoop(
        student=model_of(table(CHEAP, DEAR)),
        teacher=model_of(table()),
        score=RandomGate(RESERVED),
        visible=VISIBLE,
        end=END,
        max_tokens=8,
        cheaper=(model_of(table(DEAR, MISLED)),),
    )


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    ids = [[after(7 * number, 0)] for number in range(CONFIG.prompts * CONFIG.rounds)]
    return Prompts(ids, [0.3] * len(ids), ids, list(range(len(ids))))


@pytest.fixture(scope="module")
def trained(trio: ClosedLoop, prompts: Prompts) -> Rounds:
    """A router trained in two rounds, with its taps in the student."""
    torch.manual_seed(0)
    head = Head(trio.student, RESERVED, CONFIG.width, COSTS)
    rounds = Rounds(trio, head, CONFIG, 0, {0.3: 0.7}, lambda *_: torch.zeros(0), lambda _: 0.0)
    for number in range(CONFIG.rounds):
        rounds.play(prompts.part(number, CONFIG.prompts))
    return rounds


def logits_after(trio: ClosedLoop, token: int) -> torch.Tensor:
    return trio.student(torch.tensor([[token]])).logits[:, -1]


@pytest.mark.parametrize(
    ("gain", "lost"), [(RegretGain(type="regret"), NATS), (RatioGain(type="ratio"), 1 - math.exp(-NATS))]
)
def test_the_dearest_teacher_judges_the_others(trio, prompts, gain, lost):
    """The dearest gains what the student loses. A cheaper one gains nothing by an equally wrong token."""
    seen = collect(trio, [Request(ids) for ids in prompts.ids[:40]]).trajectories.positions
    expected = {EASY: (0, 0), CHEAP: (lost, lost), DEAR: (0, lost), MISLED: (-lost, 0)}
    last = seen.states[:, :VISIBLE].argmax(-1).tolist()
    rows = torch.tensor([expected[kind(token)] for token in last], dtype=torch.float32)
    torch.testing.assert_close(token_gain(gain, seen), rows, atol=1e-4, rtol=1e-4)
    assert {kind(token) for token in last} == {EASY, CHEAP, DEAR, MISLED}


def test_the_cheap_teacher_is_asked_if_it_suffices_and_otherwise_the_dear_one(trio, trained):
    """The price is 1 nat for a token of the dear teacher."""
    gate = trained.head.gate
    assert isinstance(gate, TeachersGate)
    meant = {EASY: None, CHEAP: SMALL, DEAR: BIG, MISLED: None}
    for token in WORDS:
        margins = gate.margins(gate.worth(logits_after(trio, token))[0], torch.tensor(1.0))
        asked = int(margins.argmax()) if margins.max() > 0 else None
        assert asked == meant[kind(token)], token


def test_a_gate_for_two_teachers_writes_what_the_dear_one_writes_and_pays_less(trio, trained, prompts):
    tree = Tree(trio, prompts.ids[:40], {"two": trained.head.gate, "entropy": EntropyGate(RESERVED)})
    run, alone, taught = tree.run([Setting("two", 1.0, FREE, 1), *ends("two")])
    assert [completion.tokens for completion in run] == [completion.tokens for completion in taught]
    assert [completion.tokens for completion in run] != [completion.tokens for completion in alone]
    asked = [number for completion in run for number in completion.asked]
    assert 0.3 < asked.count(SMALL) / len(asked) < 0.7
    assert {number for completion in taught for number in completion.asked} == {BIG}
    for completion, prompt in zip(run, prompts.ids, strict=False):
        path = [*prompt, *completion.tokens]
        for start, number in zip(completion.starts, completion.asked, strict=True):
            assert kind(path[start]) == (CHEAP if number == SMALL else DEAR)


def test_the_tree_asks_the_same_teachers_as_the_batch(trio, trained, prompts):
    gate = trained.head.gate
    tree = Tree(trio, prompts.ids[:12], {"two": gate})
    for price in (0.5, 3.0, -0.5):
        (walked,) = tree.run([Setting("two", price, 0.4, 1)])
        requests = [Request(ids, price, 0.4) for ids in prompts.ids[:12]]
        written = with_gate(trio, gate).write(requests)
        assert walked == written
        assert [completion.asked for completion in walked] == [completion.asked for completion in written]


def test_one_teacher_alone_has_prices_of_its_own(trio, trained, prompts):
    """Small is useful after a quarter of the tokens, big after a half."""
    gate = trained.head.gate
    tree = Tree(trio, prompts.ids[:12], {"small": Alone(gate, SMALL), "big": Alone(gate, BIG)})
    for name, number in (("small", SMALL), ("big", BIG)):
        (price,) = price_at_rate(tree, name, [0.2], (1, 1))
        assert 0 < price < 2 * NATS
        (run,) = tree.run([Setting(name, price, 0.2, 1)])
        assert 0.1 < teacher_rate(run) <= 0.2
        assert {asked for completion in run for asked in completion.asked} == {number}


def test_with_the_random_gate_all_teachers_write(trio, prompts):
    torch.manual_seed(0)
    run = trio.write([Request(ids, 0.5, FREE) for ids in prompts.ids[:12]])
    asked = [number for completion in run for number in completion.asked]
    assert 0.4 < asked.count(SMALL) / len(asked) < 0.6
    alone = with_gate(trio, EntropyGate(RESERVED)).write([Request(prompts.ids[0], -math.inf, FREE)])
    assert set(alone[0].asked) == {BIG}


def test_a_span_has_one_teacher():
    """A span has two tokens of small, whatever the gate means inside it. Then comes one of big."""
    draft = Draft(Bucket(Budget(fraction=FREE), 2), 8, Rollout())
    meant = [(True, SMALL), (True, BIG), (True, BIG), (False, SMALL), (False, SMALL)]
    assert [draft.write(0, [10, 20], asks, whom) for asks, whom in meant] == [10, 10, 20, 20, 0]
    assert (draft.completion.starts, draft.completion.asked) == ([0, 2], [SMALL, BIG])
    assert draft.completion.written_by(2) == [2, 2]
    # Two of five tokens at a cost of a quarter, and two at 1.
    assert relative_cost([draft.completion], COSTS) == pytest.approx(2.5 / 5)
