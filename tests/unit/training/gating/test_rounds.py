"""Rounds of gate training: their log, their continuation after a kill, budgets in words."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from router.gate import EntropyGate, Gate, RandomGate
from tests.helpers.tiny_models import END, RESERVED, VISIBLE, model
from training.gate_config import (
    ConstrainedObjective,
    DifferenceObjective,
    GateConfig,
    PriceConditioning,
    PromptConditioning,
    QualityGain,
    RatioGain,
    RegretGain,
)
from training.gating import duals
from training.gating.agreement import correlation
from training.gating.head import Head
from training.gating.prompts import Prompts, Trees, rollout_prompts
from training.gating.rollout import ClosedLoop
from training.gating.rounds import Rounds, train_gate
from training.gating.router_stage import origin
from training.tasks import make_task
from training.tokenizer import encode_prompts

torch.set_num_threads(1)
RATE = 0.2
CONFIG = GateConfig(
    span_tokens=1,
    ask_tokens=1,
    gain=RegretGain(type="regret"),
    conditioning=PriceConditioning(rate=RATE),
    rounds=3,
    prompts=40,
    epochs=4,
    batch=128,
    budgets=(0.1, 0.3),  # RATE on average
    calibration_examples=20,
)
QUALITY = QualityGain(type="quality")
WORDS = PromptConditioning(type="prompt", words="{percent}!")
OBJECTIVES = [DifferenceObjective(), ConstrainedObjective(type="constrained")]


class Letters:
    """A tokenizer of single characters; the prompt format adds one in front."""

    chat_template = None
    eos_token_id = END

    def apply_chat_template(self, chats, **_):
        return ["@" + chat[0]["content"] for chat in chats]

    def __call__(self, texts, add_special_tokens):
        if isinstance(texts, str):
            return {"input_ids": [ord(c) % VISIBLE for c in texts]}
        return {"input_ids": [[ord(c) % VISIBLE for c in text] for text in texts]}

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(97 + token) for token in tokens if token != END)


@pytest.fixture
def sources():
    return [chr(97 + i % 26) * (1 + i % 4) + chr(97 + i % 7) for i in range(CONFIG.prompts * CONFIG.rounds)]


def rounds(config: GateConfig, prompts: Prompts, max_tokens: int = 12, layers: int = 1) -> Rounds:
    student = model(0)
    pair = ClosedLoop(
        student=student,
        teacher=model(1, layers),
        score=RandomGate(RESERVED),
        visible=VISIBLE,
        end=END,
        max_tokens=max_tokens,
    )
    prices = {rate: 1 - rate for rate in sorted(set(prompts.rates))}
    return Rounds(pair, Head(student, RESERVED, config.width), config, 0, prices, fewer_repeats, weight)


def fewer_repeats(of: list[int], completions: list[list[int]]) -> torch.Tensor:
    """The worth of each completion: fewer repeated tokens are better, whatever the prompt."""
    return torch.tensor([float(len(set(tokens))) for _, tokens in zip(of, completions, strict=True)])


def weight(gate: Gate) -> float:
    """A number that differs between the rounds' gates."""
    return sum(parameter.abs().sum().item() for parameter in gate.parameters())


def log_of(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("objective", "gain"),
    [*((objective, CONFIG.gain) for objective in OBJECTIVES), (OBJECTIVES[1], QUALITY)],
    ids=lambda choice: choice.type,
)
def test_a_killed_run_continues_after_its_last_round(objective, gain, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(duals, "SETTLING", 2)
    changes = {"objective": objective, "gain": gain, "prompts": 12, "epochs": 1, "calibration_examples": 5}
    config = CONFIG.model_copy(update=changes)
    prompts = rollout_prompts(Letters(), sources, config, 0)
    with monkeypatch.context() as patch:
        save = Rounds.save

        def saves(self, file, run):
            save(self, file, run)
            if len(self.seen) == 2:  # the files on the disk if the run is killed here
                shutil.copytree(tmp_path / "a", tmp_path / "b")

        patch.setattr(Rounds, "save", saves)
        straight = train_gate(rounds(config, prompts), prompts, Letters(), tmp_path / "a", "pair")
    killed = rounds(config, prompts)
    again = train_gate(killed, prompts, Letters(), tmp_path / "b", "pair")
    assert len(killed.seen) == config.rounds
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert (straight.prices, straight.round) == (again.prices, again.round)
    for name, tensor in straight.head.state_dict().items():
        assert torch.equal(tensor, again.head.state_dict()[name]), name

    last = log_of(tmp_path / "a")[config.rounds - 1]
    assert last["violation"] == pytest.approx(last["rate"] - RATE)
    with_critic = objective.type == "constrained" and gain.type == "regret"
    assert ({"value", "value_cost", "residual"} <= last.keys()) is with_critic


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.type)
def test_a_gate_finds_where_the_student_regrets(objective, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(duals, "SETTLING", 1)
    config = CONFIG.model_copy(update={"objective": objective, "epochs": 8, "calibration_examples": 5})
    prompts = rollout_prompts(Letters(), sources, config, 0)
    train_gate(rounds(config, prompts, 24, layers=2), prompts, Letters(), tmp_path, "pair")
    first, *_, last = log_of(tmp_path)[: config.rounds]
    assert first["rate"] == pytest.approx(RATE, abs=0.05)
    assert last["gate_gain"] > 0.6


def test_every_budget_has_a_dual_variable_and_the_best_round_is_exported(sources, tmp_path, monkeypatch):
    """Calls have two tokens. The first round is the plain regression, and the second is judged best."""
    monkeypatch.setattr(duals, "SETTLING", 4)
    objective = ConstrainedObjective(type="constrained")
    calls = {"span_tokens": 2, "ask_tokens": 2, "calibration_examples": 60}
    config = CONFIG.model_copy(update={"objective": objective} | calls)
    prompts = rollout_prompts(Letters(), sources, config, 0)
    assert prompts.rates[:3] == [0.1, 0.3, 0.1]
    played = rounds(config, prompts)
    played.loop = replace(played.loop, span_tokens=2, ask_tokens=2)
    played.judged = lambda gate: -abs(len(played.seen) - 2)
    trained = train_gate(played, prompts, Letters(), tmp_path, "pair")
    regressed, second, third, *settling = log_of(tmp_path)
    assert "dual/0.1" not in regressed
    for budget in ("0.1", "0.3"):
        assert {f"dual/{budget}", f"realised/{budget}"} <= second.keys() & third.keys()
        # The last steps continue from those of the best round, with the exported gate.
        assert settling[0][f"dual/{budget}"] == third[f"dual/{budget}"]
        assert settling[-1][f"realised/{budget}"] == pytest.approx(float(budget), abs=0.05)
    assert trained.prices.keys() == {0.1, 0.3}
    assert (trained.round, second["judged"], third["judged"]) == (2, 0, -1)
    assert config.policy(trained.round) == objective


def test_a_policy_worse_than_the_regression_that_it_started_from_is_not_exported(
    sources, tmp_path, monkeypatch
):
    monkeypatch.setattr(duals, "SETTLING", 1)
    objective = ConstrainedObjective(type="constrained", start_rounds=2)
    config = CONFIG.model_copy(update={"objective": objective, "prompts": 8, "calibration_examples": 4})
    prompts = rollout_prompts(Letters(), sources, config, 0)
    played = rounds(config, prompts)
    played.judged = lambda gate: -float(len(played.seen))
    trained = train_gate(played, prompts, Letters(), tmp_path, "pair")
    first, *later = log_of(tmp_path)[: config.rounds]
    assert "judged" not in first
    assert [line["judged"] for line in later] == [-2, -3]
    assert trained.round == 2
    assert config.policy(trained.round) is None


def test_files_of_another_run_are_not_taken(sources, tmp_path):
    one = CONFIG.model_copy(update={"rounds": 1})
    prompts = rollout_prompts(Letters(), sources, one, 0)
    train_gate(rounds(one, prompts), prompts, Letters(), tmp_path, "pair")
    for config, pair in (
        (one.model_copy(update={"gain": RatioGain(type="ratio")}), "pair"),
        (one, "another pair"),
    ):
        fresh = rounds(config, prompts)
        train_gate(fresh, prompts, Letters(), tmp_path, pair)
        assert len(fresh.seen) == 1
        assert len(log_of(tmp_path)) == 1


def test_a_gate_may_learn_what_asking_changes_in_the_tasks_own_quality(sources, tmp_path):
    config = CONFIG.model_copy(update={"gain": QUALITY, "rounds": 2})
    prompts = rollout_prompts(Letters(), sources, config, 0)
    played, numbers = rounds(config, prompts), []

    def worth(of: list[int], completions: list[list[int]]) -> torch.Tensor:
        numbers.append(set(of))
        return fewer_repeats(of, completions)

    played.worth = worth
    train_gate(played, prompts, Letters(), tmp_path, "pair")
    taught, _ = played.seen
    assert len(set(taught.target.tolist())) > 3
    assert (taught.target < 0).any()  # a better token may lead to a worse completion
    assert log_of(tmp_path)[0]["gate_gain"] > 0.1
    # Once in each round, for that round's prompts.
    assert [max(of) // config.prompts for of in numbers] == [0, 1]
    assert [min(of) // config.prompts for of in numbers] == [0, 1]


def test_a_constrained_policy_may_learn_quality(sources, tmp_path, monkeypatch):
    """After the regression, the policy writes inside its buckets, at prices that spend each budget.

    The gate is then fitted on the policy's own completions alone.
    """
    monkeypatch.setattr(duals, "SETTLING", 1)
    objective = ConstrainedObjective(type="constrained")
    config = CONFIG.model_copy(update={"gain": QUALITY, "objective": objective})
    prompts = rollout_prompts(Letters(), sources, config, 0)
    played = rounds(config, prompts)
    trained = train_gate(played, prompts, Letters(), tmp_path, "pair")
    start, *by_policy = log_of(tmp_path)[: config.rounds]
    assert start["positions"] == len(played.seen[0])
    for number, line in enumerate(by_policy, 2):
        assert line["positions"] == sum(map(len, played.seen[1:number]))
        for budget in config.budgets:
            assert line[f"realised/{budget:g}"] == pytest.approx(budget, abs=0.05)
        assert line["dual/0.1"] > line["dual/0.3"]
    assert trained.prices.keys() == set(config.budgets)
    assert not played.branches


def test_rounds_of_other_data_or_another_metric_are_not_continued(tmp_path):
    for name, target in (("train", "ein Haus"), ("valid", "zwei"), ("test", "drei")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"source": name, "target": target}) + "\n")

    def of(metric: str = "bleu", pair: str = "pair", max_tokens: int = 8) -> str:
        task = make_task("jsonl", directory=str(tmp_path), metric=metric)
        return origin([pair], task, [next(task.router(0))], max_tokens)

    same = [of(), of()]
    others = [of(metric="chrf"), of(pair="another"), of(max_tokens=9)]
    (tmp_path / "train.jsonl").write_text(json.dumps({"source": "train", "target": "ein Heim"}) + "\n")
    assert len({*same, *others, of()}) == 5


def test_a_source_that_comes_again_has_the_same_number(sources):
    again = [*sources[:3], *sources[:3], "new"]
    prompts = rollout_prompts(Letters(), again, CONFIG, 0)
    assert prompts.sources == [0, 1, 2, 0, 1, 2, 3]
    assert prompts.part(1, 3).sources == [0, 1, 2]
    played = rounds(CONFIG.model_copy(update={"prompts": 6, "epochs": 1}), prompts)
    for at in range(2):
        played.play(prompts.part(at, 3))
    first, second = played.seen
    assert set(first.source.tolist()) == set(second.source.tolist()) == {0, 1, 2}


def test_correlation_is_computed_as_by_hand():
    a = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(a, 3 - 2 * a) == pytest.approx(-1)
    assert correlation(a, torch.ones(3)) == 0


def test_a_budget_in_words_begins_the_message_and_the_teacher_does_not_see_it(sources):
    config = CONFIG.model_copy(update={"conditioning": WORDS})
    prompts = rollout_prompts(Letters(), sources, config, 0)
    assert set(prompts.rates) == {0.1, 0.3}
    words = {0.1: "10!", 0.3: "30!"}
    read = zip(prompts.ids, prompts.rates, prompts.teacher_ids, sources, strict=True)
    for ids, rate, teacher_ids, source in read:
        assert ids == encode_prompts(Letters(), [words[rate] + source])[0]
        assert teacher_ids == encode_prompts(Letters(), [source])[0]

    trees = Trees(
        rounds(config, prompts).loop,
        Letters(),
        sources[:20],
        {"entropy": EntropyGate(RESERVED)},
        "{percent}!",
    )
    plain, ten, thirty = map(trees, (0.0, 0.1, 0.3))
    assert trees(0.1) is ten
    assert plain.prompt_tokens == ten.prompt_tokens  # as the teacher reads them
    assert not plain.scores("entropy")[:20].equal(ten.scores("entropy")[:20])
    assert not thirty.scores("entropy")[:20].equal(ten.scores("entropy")[:20])
