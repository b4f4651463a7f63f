"""The constrained objective: both ways from every position, residuals, critic, dual variables."""

import math
from dataclasses import replace

import pytest
import torch

from measuring.trajectories import Trajectory
from router.gate import RandomGate
from tests.helpers.tiny_models import END, MAX_TOKENS, RESERVED, VISIBLE, model
from training.gate_config import ConstrainedObjective, GateConfig, RegretGain
from training.gating import branches
from training.gating.branches import ENDED, Branches, both_ways, one_token_ways
from training.gating.constrained import Ahead, Choices, Critic, difference, fit_constrained, residuals
from training.gating.duals import ascended, wanted_rate
from training.gating.head import Head
from training.gating.lessons import Lessons, collect, teacher_view
from training.gating.prompts import Prompts
from training.gating.rollout import FREE, ClosedLoop, Request, Rollout, with_gate

torch.set_num_threads(1)
OBJECTIVE = ConstrainedObjective(type="constrained", prices=(0.1, 2.0), temperature=0.1)


@pytest.fixture(scope="module")
def pair() -> ClosedLoop:
    return ClosedLoop(
        student=model(0),
        teacher=model(1),
        score=RandomGate(RESERVED),
        visible=VISIBLE,
        end=END,
        span_tokens=4,
        max_tokens=MAX_TOKENS,
    )


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, VISIBLE, (3 + i % 5,), generator=generator).tolist() for i in range(12)]
    read_by_teacher = [prompt[i % 3 :] for i, prompt in enumerate(ids)]
    return Prompts(ids, [0.3] * 12, read_by_teacher, list(range(12)))


@pytest.mark.parametrize("ask", [1, 3])
def test_both_ways_lead_where_plain_decoding_leads(pair, prompts, ask):
    torch.manual_seed(0)
    loop = replace(pair, ask_tokens=ask)
    requests = [
        Request(ids, 0.7, FREE, teacher_ids)
        for ids, teacher_ids in zip(prompts.ids, prompts.teacher_ids, strict=True)
    ]
    seen, completions = collect(loop, requests)
    ways = both_ways(loop, prompts, seen, completions, ask)
    at = seen.positions
    states = torch.cat((at.states, ways.states))
    forked = 0
    plain = {}
    for i, (row, step) in enumerate(zip(at.row.tolist(), at.step.tolist(), strict=True)):
        prompt = prompts.ids[row]
        path = completions[row].tokens[:step]
        called = teachers(loop, prompts.teacher_ids[row], path, ask, plain)
        for number, tokens in ((ways.after_own[i], [at.own[i].item()]), (ways.after_call[i], called)):
            whole = path + tokens
            if whole[-1] == END or len(whole) == MAX_TOKENS:
                assert number == ENDED
            else:
                assert torch.allclose(states[number], state_after(loop, prompt + whole), atol=1e-4)
                forked += number.item() >= len(seen)
        assert ways.tokens[i] == len(called)
    assert forked > 10


def test_completions_that_were_served_lead_to_the_same_places(pair, prompts):
    """For calls of one token no model has to write. Cut-off completions end at the longest length."""
    torch.manual_seed(0)
    requests = [Request(ids, 0.7, FREE) for ids in prompts.ids]
    loop = replace(pair, end=pair.write(requests)[0].tokens[4])  # a token that the completions have
    seen, completions = collect(loop, requests)
    assert {completion.tokens[-1] == loop.end for completion in completions} == {True, False}
    expected = both_ways(loop, replace(prompts, teacher_ids=prompts.ids), seen, completions, 1)
    served = []
    for prompt, completion in zip(prompts.ids, completions, strict=True):
        served.append(Trajectory(prompt, completion.tokens))
    found = one_token_ways(loop.student, loop.end, served, seen)
    torch.testing.assert_close(found.states, expected.states)
    for name in ("after_own", "after_call", "tokens"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_prefixes_are_read_some_at_a_time(pair, monkeypatch):
    prefixes = [list(range(2, 2 + length)) for length in (9, 3, 7, 3, 20)]
    like = torch.zeros(0, 32)
    whole = branches.states_after(pair.student, END, prefixes, like)
    monkeypatch.setattr(branches, "TOKENS", 14)
    torch.testing.assert_close(branches.states_after(pair.student, END, prefixes, like), whole)
    assert len(branches.states_after(pair.student, END, [], like)) == 0


def teachers(
    loop: ClosedLoop, prompt: list[int], path: list[int], count: int, known: dict[tuple[int, ...], int]
) -> list[int]:
    """The teacher's next tokens, by plain forward passes; each is computed once."""
    tokens: list[int] = []
    while len(tokens) < count and len(path) + len(tokens) < MAX_TOKENS and END not in tokens:
        ids = tuple(prompt + path + tokens)
        if ids not in known:
            known[ids] = int(loop.teacher(torch.tensor([ids])).logits[0, -1, :VISIBLE].argmax())
        tokens.append(known[ids])
    return tokens


@torch.no_grad()
def state_after(loop: ClosedLoop, ids: list[int]) -> torch.Tensor:
    """The student's last hidden state."""
    return loop.student(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]


def test_joined_branches_keep_their_states():
    one = Branches(torch.zeros(1, 2), torch.tensor([1, ENDED]), torch.tensor([2, ENDED]), torch.ones(2))
    two = Branches(torch.ones(2, 2), torch.tensor([2]), torch.tensor([1]), torch.ones(1))
    joined = Branches.join([one, two])
    # Three positions, then one fork of the first part and two of the second.
    assert joined.after_own.tolist() == [1, ENDED, 5]
    assert joined.after_call.tolist() == [3, ENDED, 4]
    assert joined.states.tolist() == [[0, 0], [1, 1], [1, 1]]


def test_residuals_are_computed_as_by_hand():
    """The residual is C = r - price c + U(s') - T log pi - U(s). With even odds, log pi = log 1/2."""
    score = torch.tensor([0.5, 0.5])
    tokens = torch.tensor([1, 2])
    ahead = Ahead(called=torch.tensor([1.0, 2.0]), own=torch.tensor([3.0, 4.0]))
    entropy = 0.1 * math.log(2)
    found = residuals(
        score, torch.tensor([0.3, 7.0]), tokens, torch.tensor([5.0, 6.0]), ahead, torch.full((2,), 0.5), 0.1
    )
    assert found.ask.tolist() == pytest.approx([-0.5 + 1 - 5 + entropy, -1 + 2 - 6 + entropy])
    assert found.own.tolist() == pytest.approx([-0.3 + 3 - 5 + entropy, -7 + 4 - 6 + entropy])
    assert found.mean.tolist() == pytest.approx(((found.ask + found.own) / 2).tolist())


def test_the_difference_of_the_residuals_has_neither_the_price_nor_the_own_utility():
    generator = torch.Generator().manual_seed(0)
    score, gain, utility, called, own = torch.randn(5, 20, generator=generator).unbind()
    tokens = torch.tensor([1, 3] * 10)
    ahead = Ahead(called, own)
    for price in (0.1, 3.0):
        found = residuals(score, gain, tokens, utility + price, ahead, torch.full((20,), price), 0.2)
        expected = tokens * difference(score, gain, tokens, ahead)
        assert torch.allclose(found.ask - found.own, expected, atol=1e-5)


def test_a_single_decision_is_worth_its_gain_and_the_critic_is_convex_in_the_price(pair, prompts):
    """Every position is a path of its own: the score is the gain, U = T log(e^(-price/T) + e^(-gain/T))."""
    seen, _ = collect(with_gate(pair, RandomGate(RESERVED)), [Request(ids) for ids in prompts.ids] * 2)
    states = seen.positions.states
    count = len(seen)
    gain = torch.full((count,), 0.5)
    ended = torch.full((count,), ENDED)
    lessons = Lessons(states, gain, seen.by_teacher, *[torch.arange(count)] * 2, teacher_view(seen.positions))
    choices = Choices(lessons, Branches(states[:0], ended, ended, torch.ones(count)))
    config = GateConfig(
        span_tokens=4,
        ask_tokens=1,
        gain=RegretGain(type="regret"),
        epochs=100,
        batch=128,
        objective=OBJECTIVE,
    )
    torch.manual_seed(0)
    head = Head(pair.student, RESERVED, 16)
    head.start_from(states)
    critic = Critic(len(head.gate.mean), 16, OBJECTIVE.prices)
    fit_constrained(head, critic, choices, config, OBJECTIVE, seed=0)
    with torch.no_grad():
        assert head(states).mean().item() == pytest.approx(0.5, abs=0.05)
        x = head.features(states, head.confidence(states))
        for price in (0.2, 0.5, 1.5):
            utility = 0.1 * math.log(math.exp(-price / 0.1) + math.exp(-0.5 / 0.1))
            assert critic(x, torch.full((count,), price)).mean().item() == pytest.approx(utility, abs=0.1)


def test_the_rate_of_the_policy_does_not_count_decisions_that_exploration_changed():
    explored = Rollout(
        tokens=[5] * 10, by_teacher=[True] + [False] * 9, starts=[0], wanted=[False, True] + [False] * 8
    )
    assert wanted_rate([explored]) == pytest.approx(0.1)
    # A wanted call of three tokens in a completion of ten: there are 8 decisions, and 1 of them asks.
    called = Rollout(
        tokens=[5] * 10, by_teacher=[True] * 3 + [False] * 7, starts=[0], wanted=[True] * 3 + [False] * 7
    )
    assert wanted_rate([called]) == pytest.approx(0.3)
    assert wanted_rate([Rollout()]) == 0
    walk = replace(called, wanted=[])
    assert wanted_rate([walk]) == pytest.approx(0.3)


def test_the_loop_keeps_the_decisions_of_the_gate(pair, prompts):
    torch.manual_seed(0)
    never = replace(pair, score=lambda logits: torch.zeros(len(logits)), explore=0.5)
    completions = never.write([Request(ids, 1.0, FREE) for ids in prompts.ids])
    assert sum(completion.teacher_tokens for completion in completions) > 0
    assert wanted_rate(completions) == 0


def test_a_price_rises_if_the_student_asks_too_much():
    scores = torch.arange(101) / 100  # the share above a price is 1 - price
    assert ascended(0.8, realised=0.2, budget=0.2, scores=scores) == pytest.approx(0.8, abs=0.01)
    assert ascended(0.8, realised=0.25, budget=0.2, scores=scores) == pytest.approx(0.85, abs=0.01)
    assert ascended(0.8, realised=0.1, budget=0.2, scores=scores, step=0.5) == pytest.approx(0.75, abs=0.01)
    assert ascended(0.1, realised=0.0, budget=0.9, scores=scores) == 0
    # With calls of two tokens, asking at a third of the decisions makes half of the tokens the teacher's.
    assert ascended(0.5, realised=0.0, budget=0.5, scores=scores, tokens=2) == pytest.approx(1 / 6, abs=0.01)


@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
def test_dual_ascent_meets_a_budget_below_the_share_of_exploration(target):
    """The loop realises a rate as if it asked a fifth more often than its positions say."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, generator=generator).exp()
    price = 1.0
    for step in range(1, 13):
        realised = 1.2 * (scores > price).double().mean().item()
        price = ascended(price, realised, target, scores, step**-0.5)
    assert 1.2 * (scores > price).double().mean().item() == pytest.approx(target, abs=0.01)
