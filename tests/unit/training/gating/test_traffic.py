"""A router learned from served completions: both models' opinion of them, and the result."""

from itertools import islice

import pytest
import torch

from measuring.gateway import GatewayError
from measuring.json_lines import DataError
from measuring.trajectories import Trajectory, TrajectoryFile
from router.checkpoint import RouterCheckpoint
from router.gate import RandomGate
from tests.helpers.commands import train
from tests.helpers.numbers import tokenizer_of_numbers
from tests.helpers.recipes import write_recipe
from tests.helpers.recorded_loop import recorded
from tests.helpers.served_teacher import VLLM, client
from tests.helpers.taking_gateway import TakingGateway, stage_of
from tests.helpers.tiny_models import END, MAX_TOKENS, RESERVED, VISIBLE, model
from training.gate_config import GateConfig, QualityGain, RegretGain
from training.gating.asked import AskedPrompts
from training.gating.fitting import fit
from training.gating.head import Head
from training.gating.opinions import Observer, of_all, of_likeliest
from training.gating.rollout import ClosedLoop
from training.gating.served_calibration import TOGETHER, ServedCalibration
from training.gating.traffic import TrafficReader
from training.gating.traffic_stage import with_prices
from training.models import load_model
from training.served import ServedTeacher, VLLMServer
from training.tasks import make_task
from training.tokenizer import load_tokenizer

torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture(scope="module")
def loop() -> ClosedLoop:
    return ClosedLoop(
        student=model(0),
        teacher=model(1),
        score=RandomGate(RESERVED),
        visible=VISIBLE,
        end=END,
        span_tokens=1,
        max_tokens=MAX_TOKENS,
        cheaper=(model(2),),
    )


def test_the_models_opinion_of_served_completions_is_that_of_the_writing_models(loop):
    _, expected, _, trajectories = recorded(loop)
    seen = Observer(loop.student, loop.teacher, VISIBLE, END, loop.cheaper).seen(trajectories)
    assert torch.equal(seen.by_teacher, expected.by_teacher)
    assert 0.1 < seen.by_teacher.float().mean() < 0.5
    for name, column in vars(expected.positions).items():
        torch.testing.assert_close(getattr(seen.positions, name), column, atol=1e-4, rtol=1e-4)


def test_a_served_teacher_that_names_all_tokens_has_the_opinion_of_the_one_in_process(loop):
    trajectories = recorded(loop).served

    class Narrow(VLLM):
        @torch.no_grad()
        def prompt_logprobs(self, row, top):
            log_p = self.model(torch.tensor([row])).logits[0, :, :VISIBLE].log_softmax(-1)
            for at in range(len(row) - 1):
                yield {str(i): {"logprob": log_p[at, i].item()} for i in range(VISIBLE)}

    def behind(model):
        server = VLLMServer("teacher", "http://there", None, client(Narrow(model)))
        return ServedTeacher(server, VISIBLE)

    cheaper = [behind(loop.cheaper[0])]
    observer = Observer(loop.student, behind(loop.teacher), VISIBLE, END, cheaper)
    served = observer.seen(trajectories).positions
    local = Observer(loop.student, loop.teacher, VISIBLE, END, loop.cheaper).seen(trajectories).positions
    for name in ("row", "step", "own", "theirs", "cheaper"):
        assert torch.equal(getattr(served, name), getattr(local, name))
    for name in ("surprisal", "best", "kl", "entropy", "lost"):
        torch.testing.assert_close(getattr(served, name), getattr(local, name), atol=1e-3, rtol=1e-3)


def test_a_token_that_a_server_does_not_name_is_at_most_as_likely_as_its_least():
    log_pi = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    log_p = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log()
    own = torch.tensor([3])
    cheaper = torch.tensor([[1, 2]])  # two cheaper teachers' tokens; the server names only the first
    whole = of_all(log_pi, own, log_p, cheaper)
    ids = torch.tensor([[1, 0]])  # the batch's own token first, then the likeliest
    part = of_likeliest(log_pi, own, ids, log_p[:, [1, 0]], cheaper)
    assert part.theirs.item() == whole.theirs.item() == 0
    assert part.best.item() == pytest.approx(-torch.tensor(0.6).log().item())
    # The two named tokens leave 0.15, which is less than the smaller of the two.
    assert part.surprisal.item() == pytest.approx(-torch.tensor(0.15).log().item(), rel=1e-4)
    assert part.surprisal < whole.surprisal
    assert whole.lost[0].exp().tolist() == pytest.approx([0.6 / 0.25, 0.6 / 0.1])
    assert part.lost[0].exp().tolist() == pytest.approx([0.6 / 0.25, 0.6 / 0.15], rel=1e-4)
    known = of_likeliest(log_pi, torch.tensor([1]), ids, log_p[:, [1, 0]], cheaper)
    assert known.surprisal.item() == pytest.approx(-torch.tensor(0.25).log().item())


@pytest.fixture
def recipe(untrained_pair, tmp_path):
    router = {
        "span_tokens": 2,
        "ask_tokens": 1,
        "gain": {"type": "regret"},
        "epochs": 1,
        "rollouts": {"type": "recorded", "directory": f"{tmp_path}/record"},
    }
    return write_recipe(tmp_path, untrained_pair, router=router)


def record(directory, prompts: int, highest: int = 290):
    directory.mkdir()
    file = TrajectoryFile(directory / "gateway.jsonl", 10**6)
    torch.manual_seed(0)
    for _ in range(prompts):
        ids = torch.randint(5, highest, (9,)).tolist()
        file.add(Trajectory(ids[:4], ids[4:], [(1, 2)], 0.2))


def test_a_router_learns_from_what_gateways_recorded(recipe, tmp_path, capsys):
    record(tmp_path / "record", 30)
    assert train([recipe]) == 0
    router = RouterCheckpoint.load(tmp_path / "out" / "router")
    router.check_student(tmp_path / "out" / "student")
    assert router.config.calibration == {}
    assert router.config.expected_tokens == 5
    assert router.config.training["rollouts"] == "recorded"
    assert router.config.training["completions"] == 30
    assert "150 positions of 30 prompts; on those held out" in " ".join(capsys.readouterr().out.split())
    gate = router.learned_gate()
    assert gate.scale.std() > 0  # it was fitted: the features are standardised


def test_a_policy_is_fitted_to_completions_that_were_served(recipe, tmp_path):
    record(tmp_path / "record", 30)
    assert train([recipe]) == 0
    assert train([recipe, "router.objective={type: constrained}", f"output={tmp_path}/policy"]) == 0
    regression = RouterCheckpoint.load(tmp_path / "out" / "router")
    policy = RouterCheckpoint.load(tmp_path / "policy" / "router")
    assert policy.config.training["objective"] == "constrained"
    assert not torch.equal(policy.taps, regression.taps)


def test_of_too_many_completions_some_are_read(untrained_pair):
    """There are 20 completions of 3 tokens: 8 of them are within 25 tokens."""
    student = untrained_pair / "student"
    tokenizer = load_tokenizer(student)
    config = GateConfig(span_tokens=1, ask_tokens=1, gain=RegretGain(type="regret"))
    models = load_model(student), load_model(untrained_pair / "teacher")
    reader = TrafficReader(*models, tokenizer, config, 0)
    served = [Trajectory([5, 6 + number], [7, 8, 9]) for number in range(20)]
    assert len(reader.taught(served, 60).lessons) == 60
    assert len(reader.taught(served, 25).lessons) == 24


def test_the_features_of_the_gate_are_known_after_reading(untrained_pair, tmp_path):
    gateway = TakingGateway(load_tokenizer(untrained_pair / "student"), directory=tmp_path)
    stage = stage_of(gateway, untrained_pair, rounds=1)
    taught = stage.reader.taught([Trajectory([5, 6, 7], [8 + i, 9, 10]) for i in range(20)], 60)
    head = stage.fitted(taught)
    states = taught.lessons.states
    torch.testing.assert_close(taught.confidence, head.confidence(states))
    torch.testing.assert_close(head.scores(states, taught.confidence), head.scores(states))
    torch.manual_seed(stage.seed)
    computed = Head(stage.model, head.gate.reserved, stage.config.width)
    computed.start_from(states)
    fit(computed, taught.lessons, stage.config, stage.seed)
    torch.testing.assert_close(computed.taps, head.taps)


@pytest.mark.parametrize(
    ("prompts", "highest", "problem"),
    [
        (3, 290, "3 completions to learn from, expected at least 10"),
        (30, 330, "token ids that are not in the tokenizer"),
    ],
)
def test_a_record_that_cannot_be_learned_from_is_refused(recipe, tmp_path, capsys, prompts, highest, problem):
    record(tmp_path / "record", prompts, highest)
    assert train([recipe]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out" / "router").exists()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("router.gain={type: quality}", "gain quality needs rollouts in_process or gateway, not recorded"),
        (
            "router.objective={type: constrained, start_rounds: 1}",
            "rollouts recorded do not use objective.start_rounds",
        ),
        (
            "router.conditioning={type: prompt}",
            "conditioning prompt needs rollouts in_process, not recorded",
        ),
        ("router.prompts=4", "rollouts recorded do not use prompts: leave them out, or set them to null"),
        ("router.conditioning={type: price, rate: 0.1}", "do not use conditioning.rate"),
    ],
)
def test_settings_that_need_rollouts_in_process_are_named(recipe, capsys, override, problem):
    assert train([recipe, override]) == 2
    assert problem in capsys.readouterr().err


def asked(gateway, file, prompts: int):
    sources = [example.source for example in islice(make_task("numbers").router(0), prompts)]
    budgets = [0.1, 0.2, 0.3]
    return AskedPrompts(gateway.running(), gateway.tokenizer, sources, budgets, 3, 0, file).trajectories()


def test_a_gateway_is_asked_at_many_budgets_and_only_for_missing_completions(tmp_path):
    gateway = TakingGateway(tokenizer_of_numbers())
    first = asked(gateway, tmp_path / "0" / "asked.jsonl", prompts=7)
    assert len(first) == len(gateway.asked) == 7
    whole = asked(gateway, tmp_path / "0" / "asked.jsonl", prompts=12)
    assert whole[:7] == first
    assert len(gateway.asked) == 12, "five more"
    again = TakingGateway(gateway.tokenizer)
    assert asked(again, tmp_path / "1" / "asked.jsonl", prompts=12) == whole
    assert sorted(again.asked) == sorted(gateway.asked)
    assert len({trajectory.budget for trajectory in whole}) > 1
    assert whole[0].spans == [(0, 1)]


def test_a_gateway_of_another_student_is_refused(tmp_path):
    with pytest.raises(DataError, match="does it serve the recipe's student"):
        asked(TakingGateway(tokenizer_of_numbers(), longer=1), tmp_path / "asked.jsonl", prompts=3)


def calibration(gateway, router, budgets, file, qualities=None, sources=("one", "two")):
    """Calibrate a gate whose positions have scores of .1 to 1, in the gateway as in this process."""

    def put(found):
        gateway.running().take(with_prices(router, *found), gateway.directory)

    scores = torch.arange(1, 11) / 10
    running = gateway.running()
    return ServedCalibration(running, sources, budgets, 1, scores, put, file, qualities)


def test_prices_are_corrected_by_realised_rates(tmp_path, router):
    """A bucket holds back two tokens of ten, so a rate of .3 needs five positions above the price."""
    gateway = TakingGateway(tokenizer_of_numbers(), directory=tmp_path / "router")
    found = calibration(gateway, router, (0.3, 0.6), tmp_path / "prices.json").found()
    prices = dict(found.prices)
    assert 0.5 <= prices[0.3] < 0.6
    assert 0.2 <= prices[0.6] < 0.3
    assert found.spares == found.prices
    assert dict(gateway.router().calibration().points) == prices
    assert dict(gateway.router().spare().points) == prices
    asked = len(gateway.asked)
    assert calibration(gateway, router, (0.3, 0.6), tmp_path / "prices.json").found() == found
    assert len(gateway.asked) == asked, "what was measured is not asked for again"


def test_a_prompt_is_asked_at_every_budget_before_the_next_prompts(tmp_path, router):
    """Engines that keep prefixes then read it once, and a stopped run continues where it was."""
    gateway = TakingGateway(tokenizer_of_numbers(), directory=tmp_path / "router")
    sources = [f"prompt {number}" for number in range(TOGETHER + 2)]
    file = tmp_path / "prices.json"
    gateway.goes_away_after = 2 * TOGETHER
    with pytest.raises(KeyboardInterrupt):
        calibration(gateway, router, (0.3, 0.6), file, sources=sources).found()
    gateway.goes_away_after = 10**6
    calibration(gateway, router, (0.3, 0.6), file, sources=sources).found()
    first, last = sources[:TOGETHER], sources[TOGETHER:]
    in_order = iter(gateway.asked)
    for part in (first, last):
        for budget in (0.3, 0.6):
            at = [(source, budget) for source in part]
            assert sorted(islice(in_order, len(part))) == sorted(at), "nothing is asked for again"


def test_prices_cannot_be_measured_under_a_smaller_maximum(tmp_path, router):
    gateway = TakingGateway(tokenizer_of_numbers(), directory=tmp_path / "router")
    gateway.trouble = {"clamped": True}
    with pytest.raises(GatewayError, match=r"the API key's maximum is below the budget 0\.3"):
        calibration(gateway, router, (0.3,), tmp_path / "prices.json").found()


def test_completions_that_lost_their_teacher_are_counted(tmp_path, router, capsys):
    gateway = TakingGateway(tokenizer_of_numbers(), directory=tmp_path / "router")
    gateway.trouble = {"degraded": True}
    calibration(gateway, router, (0.3,), tmp_path / "prices.json").found()
    assert "the teacher was lost in 2 of 2 completions at budget 0.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("worth", "best"),
    [
        ({0.1: 0.8, 0.2: 0.9, 0.4: 0.5}, {0.1: 0.1, 0.2: 0.2, 0.4: 0.2}),
        ({0.1: 0.8, 0.2: 0.7, 0.4: 0.5}, {0.1: 0.1, 0.2: 0.1, 0.4: 0.1}),
        ({0.1: 0.79, 0.2: 0.8, 0.4: 0.8}, {0.1: 0.1, 0.2: 0.2, 0.4: 0.4}),
        ({0.1: 0.51, 0.2: 0.505, 0.4: 0.5}, {0.1: 0.1, 0.2: 0.2, 0.4: 0.4}),
    ],
)
def test_a_budget_is_not_spent_if_that_makes_replies_worse(tmp_path, router, worth, best):
    """Replies have these worths at the price of each budget. The last difference is not clear."""
    gateway = TakingGateway(tokenizer_of_numbers(), directory=tmp_path / "router")

    def qualities(first, answers):
        if gateway.asked[-1][1] in (0.0, 1.0):
            return [gateway.asked[-1][1]] * 2  # student and teacher alone
        price = gateway.router().calibration().price(gateway.asked[-1][1])
        spent = (sum(place / 10 > price for place in range(1, 11)) - 2) / 10
        return [worth.get(round(spent, 1), 0.0)] * len(answers)

    file = tmp_path / "prices.json"
    found = calibration(gateway, router, (0.1, 0.2, 0.4), file, qualities).found()
    spares = dict(found.spares)
    assert dict(found.prices) == {budget: spares[like] for budget, like in best.items()}
    assert dict(gateway.router().spare().points) == spares


def test_budgets_whose_prices_would_rise_share_the_best_of_both(tmp_path, router):
    """.2 is no better at the price of .1, and .4 is far better there. Both together are best at it."""
    gateway = TakingGateway(tokenizer_of_numbers(), directory=tmp_path / "router")
    worth = {(0.1, 0.1): 0.8, (0.2, 0.2): 0.8, (0.2, 0.1): 0.81, (0.4, 0.4): 0.5, (0.4, 0.2): 0.7}

    def qualities(first, answers):
        budget = gateway.asked[-1][1]
        if budget in (0, 1):
            return [budget] * len(answers)
        spent = sum(place / 10 > gateway.router().calibration().price(budget) for place in range(1, 11)) - 2
        return [worth.get((budget, spent / 10), 0.9)] * len(answers)

    found = calibration(gateway, router, (0.1, 0.2, 0.4), tmp_path / "prices.json", qualities).found()
    cheapest = dict(found.spares)[0.1]
    assert dict(found.prices) == {0.1: cheapest, 0.2: cheapest, 0.4: cheapest}


def test_a_gateway_that_does_not_take_the_router_is_named(tmp_path, router):
    gateway = TakingGateway(tokenizer_of_numbers(), directory=tmp_path / "another")
    with pytest.raises(GatewayError, match=r"does not load the router in .*: start it with --router"):
        gateway.running(patience=0).take(router, tmp_path / "router")


def test_later_rounds_are_written_with_the_router_of_the_rounds_before(untrained_pair, tmp_path):
    gateway = TakingGateway(load_tokenizer(untrained_pair / "student"), directory=tmp_path / "router")
    stage_of(gateway, untrained_pair, rounds=2).run(tmp_path / "work", tmp_path / "out")
    made = RouterCheckpoint.load(tmp_path / "out")
    assert [rate for rate, _ in made.calibration().points] == [0.1, 0.3]
    assert made.config.training["completions"] == 40
    assert gateway.taken[-1] == made.digest(), "the gateway serves with it"
    assert len(gateway.taken) >= 3, "before it the first round's, and the second's at its first prices"
    assert len({source for source, _ in gateway.asked[:40]}) == 40

    again = TakingGateway(gateway.tokenizer, directory=tmp_path / "router")
    stage_of(again, untrained_pair, rounds=2).run(tmp_path / "work", tmp_path / "again")
    assert again.asked == [], "of a finished run nothing is asked for again"
    assert RouterCheckpoint.load(tmp_path / "again").digest() == made.digest()


def test_served_completions_teach_what_asking_changes_in_the_tasks_own_quality(untrained_pair, tmp_path):
    """The gateway finishes their forks, and a run that continues after a stop has all results."""

    def stage(gateway):
        plain = stage_of(gateway, untrained_pair, 2, gain=QualityGain(type="quality", teacher_references=1))
        with torch.no_grad():  # otherwise both models repeat the last token
            for layer in plain.teacher.model.layers:
                layer.mlp.down_proj.weight.fill_(0.3).view(-1)[::3] = -0.7
        return plain

    gateway = TakingGateway(load_tokenizer(untrained_pair / "student"), directory=tmp_path / "router")
    stage(gateway).run(tmp_path / "work", tmp_path / "out")
    made = RouterCheckpoint.load(tmp_path / "out")
    assert made.config.training["gain"] == "quality"
    assert gateway.finished > 40
    again = TakingGateway(gateway.tokenizer, directory=tmp_path / "router")
    stage(again).run(tmp_path / "work", tmp_path / "again")
    assert (again.asked, again.finished) == ([], 0)
    assert RouterCheckpoint.load(tmp_path / "again").digest() == made.digest()


def test_a_killed_run_continues_within_a_round(untrained_pair, tmp_path):
    gateway = TakingGateway(load_tokenizer(untrained_pair / "student"), directory=tmp_path / "router")
    gateway.goes_away_after = 30  # half of the second round
    with pytest.raises(KeyboardInterrupt):
        stage_of(gateway, untrained_pair, rounds=2).run(tmp_path / "work", tmp_path / "out")
    gateway.goes_away_after = 10**6
    stage_of(gateway, untrained_pair, rounds=2).run(tmp_path / "work", tmp_path / "out")
    assert len({source for source, _ in gateway.asked[:40]}) == 40


def test_completions_for_another_run_are_not_learned_from(untrained_pair, tmp_path):
    gateway = TakingGateway(load_tokenizer(untrained_pair / "student"))
    stage_of(gateway, untrained_pair, rounds=2).run(tmp_path / "work", tmp_path / "out")
    assert len(gateway.asked) == 20, "a gateway that takes no routers writes one round"
    assert RouterCheckpoint.load(tmp_path / "out").config.calibration == {}
    stage_of(gateway, untrained_pair, rounds=2, seed=1).run(tmp_path / "work", tmp_path / "out")
    assert len(gateway.asked) == 40
