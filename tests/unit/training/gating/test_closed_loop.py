"""The closed loop in process: the bound, the caches, the tree of greedy decoding, gates, calibration."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate, product

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from router.checkpoint import RouterCheckpoint
from router.gate import EntropyGate, RandomGate
from tests.helpers.tiny_models import END, MAX_TOKENS, RESERVED, VISIBLE, model
from training.gate_config import GateConfig, RegretGain
from training.gating import tree as tree_module
from training.gating.calibration import Noise, PricePool, calibrate, not_rising, price_at_rate, teacher_rate
from training.gating.fitting import fit
from training.gating.forks import finished, worth_of_asking
from training.gating.head import Head
from training.gating.lessons import Lessons, collect, span_gain, teacher_view
from training.gating.rollout import FREE, ClosedLoop, Request, Rollout, cache_bytes, with_gate
from training.gating.tree import Node, Setting, Tree
from training.read_prompts import ReadPrompts
from training.reading import Stepper, attends_everywhere

GAIN = RegretGain(type="regret")
torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture(scope="module")
def pair() -> ClosedLoop:
    return ClosedLoop(
        student=model(0),
        teacher=model(1),
        score=EntropyGate(RESERVED),
        visible=VISIBLE,
        end=END,
        span_tokens=2,
        max_tokens=MAX_TOKENS,
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VISIBLE, (3 + i % 5,), generator=generator).tolist() for i in range(20)]


def test_greedy_completions_are_the_models_own(pair, prompts):
    """The reference is plain forward passes without cache, padding or batch."""
    for price, fraction, writer in ((math.inf, 0.0, pair.student), (-math.inf, 1.0, pair.teacher)):
        completions = pair.write([Request(p, price, fraction) for p in prompts], batch=16)
        assert len({tuple(c.tokens) for c in completions}) > 10
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([prompt + completion.tokens])
            expected = writer(ids).logits[0, len(prompt) - 1 : -1, :VISIBLE].argmax(-1).tolist()
            assert completion.tokens == expected
            assert END not in completion.tokens[:-1]
            assert set(completion.by_teacher) == {writer is pair.teacher}


def test_the_bound_holds_at_every_moment_even_when_the_gate_always_asks(pair, prompts):
    tree = Tree(pair, prompts, {"entropy": EntropyGate(RESERVED)})
    spans = ((1, 1), (4, 1), (4, 4))
    settings = [Setting("entropy", -math.inf, f, *span) for f, span in product((0.1, 0.3, 0.7), spans)]
    for setting, completions in zip(settings, tree.run(settings), strict=True):
        assert max(c.teacher_tokens for c in completions) >= setting.span_tokens, setting
        for completion in completions:
            spent = 0
            for length, foreign in enumerate(completion.by_teacher, 1):
                spent += foreign
                assert spent <= setting.fraction * length + setting.span_tokens + 1e-9, setting


def test_without_a_budget_the_teacher_writes_nothing(pair, prompts):
    tree = Tree(pair, prompts, {"entropy": EntropyGate(RESERVED)})
    (completions,) = tree.run([Setting("entropy", -math.inf, 0.0, 2)])
    assert sum(c.teacher_tokens for c in completions) == 0
    assert all(not c.starts for c in completions)


def test_the_tree_decodes_as_the_batch_does(pair, prompts):
    tree = Tree(pair, prompts, {"entropy": EntropyGate(RESERVED)})
    prices = torch.quantile(tree.scores("entropy"), torch.tensor([0.1, 0.5, 0.9])).tolist()
    walks = tree.run([Setting("entropy", price, 0.3, pair.span_tokens) for price in prices])
    for price, walked in zip(prices, walks, strict=True):
        written = pair.write([Request(p, price, 0.3) for p in prompts], batch=15)
        assert 0 < teacher_rate(written) < 0.4, price
        assert walked == written, price


def test_a_request_may_end_sooner_than_the_loop(pair, prompts):
    """It gets as many tokens as it wants while others of its batch go on, and a budget for its own length."""
    for price, fraction in ((math.inf, 0.0), (-math.inf, 1.0)):
        whole = pair.write([Request(p, price, fraction) for p in prompts])
        limits = [1 + number % MAX_TOKENS for number in range(len(prompts))]
        cut = pair.write(
            [Request(p, price, fraction, max_tokens=n) for p, n in zip(prompts, limits, strict=True)]
        )
        assert [c.tokens for c in cut] == [w.tokens[:n] for w, n in zip(whole, limits, strict=True)]
    assert any(len(completion.tokens) == MAX_TOKENS for completion in whole)


def depths(node: Node, depth: int = 0) -> Iterator[int]:
    """The number of tokens before a node, for the node and all nodes below it."""
    yield depth
    for below in node.next.values():
        yield from depths(below, depth + 1)


def test_the_tree_grows_no_deeper_than_a_completion(pair, prompts):
    """So no pass is wasted, and prices are quantiles of scores at positions where the student may ask."""
    tree = Tree(pair, prompts, {"entropy": EntropyGate(RESERVED)})
    tree.run([Setting("entropy", price, 0.5, 1) for price in (-math.inf, 0.5, 1.0)])
    found = [depth for root in tree._roots.values() for depth in depths(root)]
    assert max(found) == MAX_TOKENS - 1
    assert len(found) == len(tree) == len(tree.scores("entropy"))


def test_the_tree_refuses_sampling(pair, prompts):
    with pytest.raises(ValueError, match="greedy"):
        Tree(with_gate(pair, pair.score, explore=0.1), prompts, {})


def test_calibration_keeps_the_budget_and_its_prices_fall(pair, prompts):
    tree = Tree(pair, prompts, {"entropy": EntropyGate(RESERVED), "random": RandomGate(RESERVED)})
    budgets = (0.05, 0.2, 0.5)
    for gate in ("entropy", "random"):
        # Here more teacher tokens are always better, so the calibration must use the whole budget.
        points = calibrate(tree, gate, budgets, (1, 1), quality=teacher_rate)
        assert [budget for budget, _ in points] == list(budgets)
        prices = [price for _, price in points]
        assert prices == sorted(prices, reverse=True)
        runs = tree.run([Setting(gate, price, budget, 1) for budget, price in points])
        rates = [teacher_rate(run) for run in runs]
        assert rates == sorted(rates)
        # A price that is lowered to keep the order may overshoot a little.
        assert all(rate <= budget + 0.02 for rate, budget in zip(rates, budgets, strict=True))
        assert rates[-1] > 0.3


def test_a_price_leaves_its_aim_only_for_a_gain_above_the_noise(pair, prompts):
    tree = Tree(pair, prompts, {"entropy": EntropyGate(RESERVED)})
    budgets = (0.2, 0.5)

    def frugal(run: list[Rollout]) -> float:
        """Asking costs quality: never asking is the best, by as much as the aim asks."""
        return -teacher_rate(run)

    def prices(*noise: Noise) -> list[float]:
        return [price for _, price in calibrate(tree, "entropy", budgets, (1, 1), frugal, *noise)]

    prices()  # the tree grows, and its quantiles with it
    aims = list(accumulate(price_at_rate(tree, "entropy", budgets, (1, 1)), min))
    left, near = prices(), partial(pytest.approx, abs=0.02)
    assert all(price > aim + 0.05 for price, aim in zip(left, aims, strict=True))
    assert prices(lambda one, other: 0.3) == near(aims)
    # Two standard errors of 0.01 are less than the possible gain.
    assert prices(lambda one, other: 0.01) == near(left)


def test_budgets_whose_prices_would_rise_share_the_one_that_is_best_for_all_of_them():
    common = [3.0, 2.0, 1.0]
    choices = [
        PricePool([0.05], 3.0, [0.9, 0.5, 0.1]),
        PricePool([0.1], 1.0, [0.4, 0.7, 0.75]),  # 2.0 is nearly as good here,
        PricePool([0.2], 2.0, [0.5, 0.9, 0.6]),  # and much better here: 1.6 of both, 1.35 at 1.0
        PricePool([0.5], 1.0, [0.0, 0.0, 0.9]),
    ]
    pools = not_rising(choices, common)
    assert [(pool.budgets, pool.price) for pool in pools] == [([0.05], 3.0), ([0.1, 0.2], 2.0), ([0.5], 1.0)]
    # A price that would rise above all earlier ones is pooled with all of them.
    low = PricePool([0.05], 2.5, [0.9, 0.5, 0.1])
    pools = not_rising([low, choices[1], PricePool([0.2], 4.0, [1.5, 0.0, 0.0])], common)
    assert [(pool.budgets, pool.price) for pool in pools] == [([0.05, 0.1, 0.2], 3.0)]


def test_the_gain_of_spans_is_computed_as_by_hand():
    row = torch.tensor([0, 0, 0, 1, 1])
    by_teacher = torch.tensor([False, True, False, False, False])
    gain = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    target, known = span_gain(gain, row, by_teacher, 2)
    assert target.tolist() == [1.5, 3.0, 2.0, 12.0, 8.0]  # rows do not leak into each other
    assert known.tolist() == [True, False, True, True, True]  # the teacher wrote the span's first token there
    target, known = span_gain(gain, row, by_teacher, 1)
    assert target.tolist() == gain.tolist()
    assert known.all()


def test_a_fitted_gate_has_learned_its_target_and_survives_the_checkpoint(pair, prompts):
    seen, _ = collect(pair, [Request(p) for p in prompts])
    states = seen.positions.states
    target = (states[:, 0] > 0).float()
    head = Head(pair.student, RESERVED, 16)
    head.start_from(states)
    config = GateConfig(span_tokens=1, ask_tokens=1, gain=GAIN, epochs=40, batch=64)
    row = seen.positions.row
    lessons = Lessons(states, target, seen.by_teacher, row, row, teacher_view(seen.positions))
    loss = fit(head, lessons, config, seed=0)["loss"]
    assert loss < 0.3 * target.var().item()
    with torch.no_grad():
        logits = head.logits(states)
        assert torch.allclose(
            logits[:, :VISIBLE], states @ pair.student.lm_head.weight[:VISIBLE].T, atol=1e-5
        )
        assert torch.allclose(head.gate(logits), head(states))
    assert RouterCheckpoint.__dataclass_fields__.keys() >= {"taps", "gate"}


def test_the_worth_until_the_end_is_computed_as_by_hand(pair, prompts):
    """Quality is asked for whole completions, which the student alone writes from the fork on."""
    some, asked = prompts[:6], []
    asking = with_gate(pair, RandomGate(RESERVED))
    seen, completions = collect(asking, [Request(p, 0.7, FREE) for p in some])

    def worth(rows: list[int], whole: list[list[int]]) -> torch.Tensor:
        asked.extend(zip(rows, map(tuple, whole), strict=True))
        return torch.tensor([float(len(tokens) + 10 * row) for row, tokens in zip(rows, whole, strict=True)])

    def alone(row: int, begun: list[int]) -> list[int]:
        if begun[-1] == END or len(begun) == pair.max_tokens:
            return begun
        (rest,) = pair.write([Request(some[row] + begun)])
        return (begun + rest.tokens)[: pair.max_tokens]

    changed = worth_of_asking(seen, completions, partial(finished, pair, some), worth)
    at = seen.positions
    differ = (at.own != at.theirs).nonzero().squeeze(1).tolist()
    assert len(differ) > 3
    wholes = set()
    for i in differ:
        row = at.row[i].item()
        begun = completions[row].tokens[: at.step[i]]
        own, theirs = (alone(row, [*begun, token.item()]) for token in (at.own[i], at.theirs[i]))
        assert changed[i].item() == len(theirs) - len(own)
        wholes |= {(row, tuple(own)), (row, tuple(theirs))}
    assert set(asked) == wholes
    assert len(asked) < 1.5 * len(differ)
    assert changed.count_nonzero() <= len(differ)
    assert any(sum(completion.by_teacher) for completion in completions)


@contextmanager
def reads_counted(pair: ClosedLoop, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens in each forward pass of either model."""
    read = []
    forward = type(pair.student).forward

    def counting(model, **inputs):
        read.append(inputs["input_ids"].numel())
        return forward(model, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(type(pair.student), "forward", counting)
        yield read


def begun_after(prompt: list[int]) -> list[Request]:
    """30 requests that continue after a prompt."""
    return [Request(prompt, begun=[2 + i % 5] * (1 + i % 3)) for i in range(30)]


def test_forks_of_a_prompt_share_the_students_reading_of_it(pair, prompts, monkeypatch):
    """All 30 forks have one prompt of 40 tokens. If each read it, that alone would be 1,200 tokens."""
    prompt = (prompts[0] * 40)[:40]
    begun = [request.begun for request in begun_after(prompt)]
    with reads_counted(pair, monkeypatch) as read:
        whole = finished(pair, [prompt], [0] * 30, begun)
    assert read[0] == 40
    assert sum(read) < 600
    alone = pair.write([Request(prompt + tokens) for tokens in begun])
    for tokens, rest, made in zip(begun, alone, whole, strict=True):
        assert made == (tokens + rest.tokens)[: pair.max_tokens]


def test_requests_that_continue_after_a_prompt_share_its_reading(pair, prompts, monkeypatch):
    """Both models read the prompt once for all 30, although another prompt of its length comes in between."""
    one, other = (prompts[0] * 40)[:40], (prompts[1] * 40)[:40]
    mixed = begun_after(one)
    mixed[3:3] = begun_after(other)[:2]
    asked = [
        replace(request, price=0.5, fraction=0.5, teacher_prompt=request.prompt[1:]) for request in mixed
    ]
    with reads_counted(pair, monkeypatch) as read:
        together = pair.write(asked)
    assert read[0] == 2 * 40  # the student's
    assert read[2] == 2 * 39  # the teacher's
    assert sum(read) < 2 * 600
    for request, completion in zip(asked, together, strict=True):
        apart = Request(
            request.prompt + request.begun, 0.5, 0.5, teacher_prompt=request.teacher_prompt + request.begun
        )
        assert pair.write([apart]) == [completion]


def test_a_tree_reads_a_prompt_once(pair, prompts, monkeypatch):
    """It is read once however often the tree grows, and the tree is the same as without kept prompts."""
    longer = [(prompt * 40)[: 40 - number] for number, prompt in enumerate(prompts[:6])]
    trees = []
    for limit in (0, 10**9):
        monkeypatch.setattr(tree_module, "KEPT_BYTES", limit)
        with reads_counted(pair, monkeypatch) as read:
            tree = Tree(pair, longer, {"gate": EntropyGate(RESERVED)})
        assert max(read) == 6 * 40
        prices = torch.quantile(tree.scores("gate"), torch.linspace(0.1, 0.9, 9)).tolist()
        with reads_counted(pair, monkeypatch) as read:
            runs = tree.run([Setting("gate", price, FREE, 1) for price in prices])
        assert any(1 < count < 30 for count in read)  # several went on at once
        assert (max(read) < 30) is bool(limit), "a prompt alone has 35"
        trees.append((len(tree), runs))
    assert trees[0] == trees[1]


def test_prompts_are_kept_as_long_as_there_is_room(pair, prompts):
    """The cache has room for 7 tokens."""
    kept = ReadPrompts(cache_bytes(pair.student) * 7)
    Stepper(pair.student).start(prompts[:5], [[]] * 5, END, kept)
    assert kept.has(pair.student, prompts[:2])  # 3 and 4 tokens
    assert not kept.has(pair.student, prompts[2:3])
    assert not kept.has(pair.teacher, prompts[:2])


def test_forks_of_a_student_with_a_sliding_window_have_no_padding_in_between(pair, prompts):
    config = MistralConfig(
        vocab_size=RESERVED.end, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    student = MistralForCausalLM(config).eval().requires_grad_(False)
    assert not attends_everywhere(student.config)
    windowed = replace(pair, student=student, teacher=student)
    begun = [[2 + i] * (1 + 3 * (i % 2)) for i in range(8)]
    whole = finished(windowed, prompts, range(8), begun)
    alone = windowed.write([Request(prompts[row] + tokens) for row, tokens in enumerate(begun)], batch=1)
    assert len({tuple(tokens) for tokens in whole}) == 8
    for tokens, rest, made in zip(begun, alone, whole, strict=True):
        assert made == (tokens + rest.tokens)[: pair.max_tokens]


def test_the_teacher_reads_its_own_prompt(pair, prompts):
    """The teacher's completions are those of the plain prompt, and the student's are not."""
    shown = [p[:1] + [7, 9, 11][: 1 + i % 3] + p[1:] for i, p in enumerate(prompts)]
    for price, fraction, same in ((-math.inf, 1.0, True), (math.inf, 0.0, False)):
        plain = pair.write([Request(p, price, fraction) for p in prompts], batch=16)
        prompted = pair.write(
            [Request(p, price, fraction, q) for p, q in zip(shown, prompts, strict=True)], batch=16
        )
        assert (plain == prompted) is same
