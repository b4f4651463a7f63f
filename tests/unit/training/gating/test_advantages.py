"""The advantage of asking while the policy goes on, against decoding token by token."""

from collections.abc import Sequence

import pytest
import torch

from router.budget import Bucket, Budget
from router.gate import EntropyGate, RandomGate
from tests.helpers.tiny_models import END, RESERVED, VISIBLE, model
from training.gating.advantages import advantages
from training.gating.rollout import ClosedLoop
from training.gating.tree import Setting, Tree, WalkPlan

torch.set_num_threads(1)
MAX_TOKENS = 10
FRACTION = 0.3
SPAN = 2


@pytest.fixture(scope="module")
def pair() -> ClosedLoop:
    score = RandomGate(RESERVED)
    return ClosedLoop(model(0), model(1), score, VISIBLE, END, SPAN, 1, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(END + 1, VISIBLE, (n,), generator=generator).tolist() for n in (2, 5, 3, 4)]


class Naive:
    """A completion, token by token, whose first decisions are given."""

    def __init__(self, pair: ClosedLoop, prompt: list[int], price: float, decisions: Sequence[bool]) -> None:
        self.tokens: list[int] = []
        self.by_teacher: list[bool] = []
        self.own: list[int] = []
        self.theirs: list[int] = []
        bucket = Bucket(Budget(fraction=FRACTION), SPAN, 1)
        gate = EntropyGate(RESERVED)
        with torch.no_grad():
            while not self.tokens or (self.tokens[-1] != END and len(self.tokens) < MAX_TOKENS):
                step = len(self.tokens)
                read = torch.tensor([prompt + self.tokens])
                logits = pair.student(read).logits[0, -1]
                self.own.append(int(logits[:VISIBLE].argmax()))
                self.theirs.append(int(pair.teacher(read).logits[0, -1, :VISIBLE].argmax()))
                asks = decisions[step] if step < len(decisions) else bool(gate(logits) > price)
                self.by_teacher.append(asks and bucket.reserve(step, MAX_TOKENS - step) is not None)
                self.tokens.append(self.theirs[-1] if self.by_teacher[-1] else self.own[-1])


def worth(rows: Sequence[int], completions: Sequence[list[int]]) -> torch.Tensor:
    """A number that differs between completions, and between the rows of equal ones."""
    values = []
    for row, tokens in zip(rows, completions, strict=True):
        values.append(sum((place + 1.5) * token for place, token in enumerate(tokens)) + 100.0 * row)
    return torch.tensor(values)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_advantages_are_computed_as_by_hand(pair, prompts, share):
    tree = Tree(pair, prompts, {"entropy": EntropyGate(RESERVED)})
    price = torch.quantile(tree.scores("entropy"), share).item()
    setting = Setting("entropy", price, FRACTION, SPAN, 1)
    plans = [WalkPlan(number, setting) for number in range(len(prompts))]
    found = advantages(tree, [*plans, plans[0]], worth)  # a prompt may have several completions
    at = 0
    full = 0
    seen = found.trajectories.positions
    for row, prompt in enumerate([*prompts, prompts[0]]):
        path = Naive(pair, prompt, price, ())
        assert found.completions[row].tokens == path.tokens
        for step, (own, theirs) in enumerate(zip(path.own, path.theirs, strict=True)):
            assert (seen.row[at].item(), seen.step[at].item()) == (row, step)
            assert (seen.own[at].item(), seen.theirs[at].item()) == (own, theirs)
            assert found.trajectories.by_teacher[at].item() == path.by_teacher[step]
            before = path.by_teacher[:step]
            asks, writes = (Naive(pair, prompt, price, [*before, first]) for first in (True, False))
            if own == theirs:
                assert found.known[at]
                assert found.advantage[at] == 0
            elif asks.by_teacher[step]:
                assert found.known[at]
                change = worth([row], [asks.tokens]) - worth([row], [writes.tokens])
                later = sum(asks.by_teacher[step + 1 :]) - sum(writes.by_teacher[step + 1 :])
                assert found.advantage[at].item() == pytest.approx(change.item() - price * later, rel=1e-5)
            else:
                assert not found.known[at]
                full += 1
            at += 1
    assert at == len(found.advantage)
    assert (full > 0) is (share < 0.9), "a gate that asks often meets an empty bucket"


def test_a_price_below_zero_pays_nobody_for_teacher_tokens(pair, prompts):
    """A budget that the policy does not use up has no price."""
    tree = Tree(pair, prompts, {"entropy": EntropyGate(RESERVED)})
    found = []
    for price in (-1.0, -1000.0):
        setting = Setting("entropy", price, FRACTION, SPAN, 1)
        found.append(advantages(tree, [WalkPlan(0, setting)], worth).advantage)
    assert found[0].any()
    assert torch.equal(*found)
