"""A router from completions that were served: what both models think of them, and what is learned."""

import json

import httpx
import pytest
import torch

from measuring.json_lines import DataError
from measuring.trajectories import Trajectory, TrajectoryFile
from router.checkpoint import RouterCheckpoint
from router.gate import RandomGate
from tests.helpers.commands import train
from tests.helpers.numbers import tokenizer_of_numbers
from tests.helpers.served_teacher import VLLM, client
from tests.helpers.tiny_models import END, MAX_TOKENS, RESERVED, VISIBLE, model
from training.gate_config import GateConfig, GatewayRollouts, RegretGain
from training.gating.lessons import collect
from training.gating.opinions import Observer, of_all, of_likeliest
from training.gating.rollout import FREE, ClosedLoop, Request
from training.gating.traffic_stage import Asked
from training.served import ServedTeacher, VLLMServer
from training.tasks import make_task
from training.tokenizer import encode_prompts

torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture(scope="module")
def loop() -> ClosedLoop:
    return ClosedLoop(
        student=model(0),
        teacher=model(1, layers=2),
        score=RandomGate(RESERVED),
        visible=VISIBLE,
        end=END,
        span_tokens=1,
        max_tokens=MAX_TOKENS,
    )


def written(loop):
    """What the closed loop saw of 20 completions, and the completions as a gateway records them."""
    torch.manual_seed(0)
    prompts = [torch.randint(2, VISIBLE, (3 + i % 5,)).tolist() for i in range(20)]
    seen, completions = collect(loop, [Request(prompt, 0.7, FREE) for prompt in prompts])
    trajectories = []
    for prompt, completion in zip(prompts, completions, strict=True):
        spans = [(start, start + 1) for start in completion.starts]
        trajectories.append(Trajectory(prompt, completion.tokens, spans))
    return seen, trajectories


def test_models_think_of_what_was_served_as_they_did_when_they_wrote_it(loop):
    expected, trajectories = written(loop)
    seen = Observer(loop.student, loop.teacher, VISIBLE, END).seen(trajectories)
    assert torch.equal(seen.by_teacher, expected.by_teacher)
    assert 0.1 < seen.by_teacher.float().mean() < 0.5
    for name, column in vars(expected.positions).items():
        torch.testing.assert_close(getattr(seen.positions, name), column, atol=1e-4, rtol=1e-4)


def test_a_served_teacher_that_names_all_tokens_thinks_as_the_one_in_process(loop):
    _, trajectories = written(loop)

    class Narrow(VLLM):
        @torch.no_grad()
        def prompt_logprobs(self, row, top):
            log_p = self.model(torch.tensor([row])).logits[0, :, :VISIBLE].log_softmax(-1)
            for at in range(len(row) - 1):
                yield {str(i): {"logprob": log_p[at, i].item()} for i in range(VISIBLE)}

    server = VLLMServer("teacher", "http://there", None, client(Narrow(loop.teacher)))
    served = Observer(loop.student, ServedTeacher(server, VISIBLE), VISIBLE, END).seen(trajectories).positions
    local = Observer(loop.student, loop.teacher, VISIBLE, END).seen(trajectories).positions
    for name in ("row", "step", "own", "theirs"):
        assert torch.equal(getattr(served, name), getattr(local, name))
    for name in ("surprisal", "best", "kl", "entropy"):
        torch.testing.assert_close(getattr(served, name), getattr(local, name), atol=1e-3, rtol=1e-3)


def test_a_token_that_a_server_does_not_name_is_at_most_as_likely_as_its_least():
    log_pi = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    log_p = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log()
    own = torch.tensor([3])
    whole = of_all(log_pi, own, log_p)
    ids = torch.tensor([[1, 0]])  # the batch's own token first, then the likeliest
    part = of_likeliest(log_pi, own, ids, log_p[:, [1, 0]])
    assert part.theirs.item() == whole.theirs.item() == 0
    assert part.best.item() == pytest.approx(-torch.tensor(0.6).log().item())
    # The two that it names leave 0.15, which is less than the least of them.
    assert part.surprisal.item() == pytest.approx(-torch.tensor(0.15).log().item(), rel=1e-4)
    assert part.surprisal < whole.surprisal
    known = of_likeliest(log_pi, torch.tensor([1]), ids, log_p[:, [1, 0]])
    assert known.surprisal.item() == pytest.approx(-torch.tensor(0.25).log().item())


@pytest.fixture
def recipe(untrained_pair, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
output: {tmp_path}/out
work: {tmp_path}/work
max_tokens: 8
task: {{name: numbers}}
teacher: {{pretrained: {untrained_pair}/teacher}}
student: {{pretrained: {untrained_pair}/student}}
router:
  span_tokens: 2
  ask_tokens: 1
  gain: {{type: regret}}
  epochs: 1
  rollouts: {{type: recorded, directory: {tmp_path}/record}}
""")
    return str(path)


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


@pytest.mark.parametrize(
    ("prompts", "highest", "problem"),
    [
        (3, 290, "3 completions to learn from, want at least 10"),
        (30, 330, "token ids that the tokenizer does not"),
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
        ("router.gain={type: quality}", "gain quality is for rollouts in_process, not recorded"),
        (
            "router.objective={type: constrained}",
            "objective constrained is for rollouts in_process, not recorded",
        ),
        (
            "router.conditioning={type: prompt}",
            "conditioning prompt is for rollouts in_process, not recorded",
        ),
        ("router.prompts=4", "rollouts recorded make no use of prompts: leave them out, or set them to null"),
        ("router.conditioning={type: price, rate: 0.1}", "make no use of conditioning.rate"),
    ],
)
def test_what_needs_rollouts_in_process_says_so(recipe, capsys, override, problem):
    assert train([recipe, override]) == 2
    assert problem in capsys.readouterr().err


class Gateway:
    """A stand-in for a gateway: OpenAI's client reads its replies."""

    def __init__(self, tokenizer, longer: int = 0) -> None:
        self.tokenizer = tokenizer
        self.longer = longer
        self.asked = []

    def __call__(self, request):
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "wheels"}]})
        body = json.loads(request.content)
        self.asked.append((body["messages"][0]["content"], body["teacher_budget"]))
        (prompt,) = encode_prompts(self.tokenizer, [body["messages"][0]["content"]])
        chat = {
            "choices": [{"message": {"content": "x"}, "token_ids": [9, 10]}],
            "usage": {"prompt_tokens": len(prompt) + self.longer},
            "teacher": {"spans": [[1, 2]], "tokens": 1, "calls": 1, "degraded": False},
        }
        return httpx.Response(200, json=chat)


def asked(gateway, tmp_path, prompts: int):
    config = GateConfig(
        span_tokens=1,
        ask_tokens=1,
        gain=RegretGain(type="regret"),
        rollouts=GatewayRollouts(type="gateway", url="http://there", batch=3),
        prompts=prompts,
    )
    transport = httpx.AsyncClient(transport=httpx.MockTransport(gateway))
    task = make_task("numbers")
    return Asked(config.rollouts, gateway.tokenizer, task, config, 8, 0, transport).trajectories(tmp_path)


def test_a_gateway_is_asked_at_many_budgets_and_only_for_what_is_missing(tmp_path):
    gateway = Gateway(tokenizer_of_numbers())
    first = asked(gateway, tmp_path, prompts=6)
    assert len(first) == len(gateway.asked) == 6
    whole = asked(gateway, tmp_path, prompts=12)
    assert whole[:6] == first
    assert len(gateway.asked) == 12  # six more
    again = Gateway(gateway.tokenizer)
    assert asked(again, tmp_path / "new", prompts=12) == whole
    assert sorted(again.asked) == sorted(gateway.asked)
    assert len({trajectory.budget for trajectory in whole}) > 1
    assert whole[0].spans == [(1, 2)]


def test_a_gateway_of_another_student_is_refused(tmp_path):
    with pytest.raises(DataError, match="does it serve the recipe's student"):
        asked(Gateway(tokenizer_of_numbers(), longer=1), tmp_path, prompts=3)
