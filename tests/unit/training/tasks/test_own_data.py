"""A user's own data: files, datasets, conversations, prompts without answers, metrics and judges."""

import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pyarrow
import pyarrow.parquet
import pytest

from measuring.chats import Turn, messages_of, shown
from measuring.examples import Example, References
from measuring.json_lines import DataError
from tests.helpers.numbers import tokenizer_of_numbers
from training.batches import Demonstrations
from training.tasks import make_task
from training.tasks.judging import JudgeError, ServedJudge
from training.tokenizer import encode_prompts

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who are you?"},
]
ANSWER = {"role": "assistant", "content": "A model."}
TURNS = tuple(Turn(**message) for message in CHAT)


def shout(target: str, answer: str) -> float:
    """A user's own metric."""
    return float(answer == target.upper())


def brevity(messages: list[dict[str, str]], answer: str) -> float:
    """A user's own judge: an answer is right if it is as long as the last message."""
    return float(len(answer) == len(messages[-1]["content"]))


def too_much(_target: str, _answer: str) -> float:
    """A metric whose value is not in [0, 1]."""
    return 100.0


def write(directory, rows):
    for number, split in enumerate(("train", "valid", "test")):
        lines = [json.dumps(row | extra) + "\n" for row, extra in rows(number)]
        (directory / f"{split}.jsonl").write_text("".join(lines))
    return str(directory)


def conversations(number):
    """Conversations of each split. Their system prompts differ, so none is held out of another split."""
    chat = [{"role": "system", "content": f"Be brief, {number}."}, *CHAT[1:]]
    return [({"messages": [*chat, ANSWER]}, {})]


def test_the_last_answer_of_a_conversation_is_its_target(tmp_path):
    task = make_task("jsonl", directory=write(tmp_path, conversations))
    (example,) = task.test()
    assert example.source == (Turn("system", "Be brief, 2."), *TURNS[1:])
    assert example.references == References.one("A model.")
    assert messages_of(example.source)[1:] == CHAT[1:]
    assert shown(example.source) == "Who are you?"


def test_a_conversation_is_rendered_by_the_chat_template():
    tokenizer = tokenizer_of_numbers()
    (ids,) = encode_prompts(tokenizer, [TURNS])
    text = "<|system|>Be brief.<|user|>Hi<|assistant|>Hello.<|end|><|user|>Who are you?<|assistant|>"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("Hi", "not a list of turns"),
        ([], "not a list of turns"),
        ([{"role": "user"}], "turn 1 of 'messages': the content is not text"),
        ([CHAT[1], {"role": "tool", "content": "x"}], "turn 2 of 'messages': the role is 'tool'"),
        ([ANSWER], "have no question before the answer"),
        (CHAT, "must end with an answer"),
    ],
)
def test_a_line_without_a_conversation_is_named(tmp_path, messages, problem):
    directory = write(tmp_path, lambda number: [({"messages": messages}, {})])
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{problem}"):
        make_task("jsonl", directory=directory)


def test_prompts_without_an_answer_need_a_judge(tmp_path):
    directory = write(tmp_path, lambda number: [({"source": f"word {number}"}, {})])
    with pytest.raises(DataError, match=r"train\.jsonl:1: has no 'target'"):
        make_task("jsonl", directory=directory)
    task = make_task("jsonl", directory=directory, judge=f"{__name__}:brevity")
    assert not task.has_references
    scores = task.score([*task.test(), *task.test()], ["six it", "at least"])
    assert scores.quality == scores.similarity == [1.0, 0.0]
    batch = Demonstrations(task, tokenizer_of_numbers(), 1, seed=0)[0]
    assert batch.targets.tolist() == [tokenizer_of_numbers().eos_token_id]


def test_a_metric_of_ones_own_scores_answers(tmp_path):
    directory = write(tmp_path, lambda number: [({"source": str(number), "target": "yes"}, {})])
    task = make_task("jsonl", directory=directory, metric=f"{__name__}:shout")
    assert task.score([*task.test(), *task.test()], ["YES", "yes"]).quality == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"returned 100\.0, expected a number from 0 to 1"):
        make_task("jsonl", directory=directory, metric=f"{__name__}:too_much").score(task.test(), ["yes"])
    for name, problem in (
        ("nosuch", "unknown metric"),
        ("no.such:thing", "No module"),
        ("json:x", "no attribute"),
    ):
        with pytest.raises(ValueError, match=problem):
            make_task("jsonl", directory=directory, metric=name)


@pytest.fixture
def parquet(tmp_path):
    """A Parquet file of ten questions with answers, also as conversations."""
    rows = {
        "question": [f"question {n}" for n in range(10)],
        "answer": [f"answer {n}" for n in range(10)],
        "chat": [[{"role": "user", "content": f"question {n}"}, ANSWER] for n in range(10)],
    }
    file = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), file)
    return {
        "path": "parquet",
        "data_files": str(file),
        "train": "train[:6]",
        "valid": "train[6:8]",
        "test": "train[8:]",
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Give the library a cache of the test's own, as it keeps data that it has read."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_a_dataset_is_read_by_its_columns(parquet):
    task = make_task("dataset", **parquet, source="question", target="answer")
    assert task.valid() == [Example(f"question {n}", References.one(f"answer {n}")) for n in (6, 7)]
    assert len({next(iter(task.train(seed))).source for seed in range(40)}) == 6
    chats = make_task("dataset", **parquet, messages="chat")
    assert chats.test()[0] == Example((Turn("user", "question 8"),), References.one("A model."))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"source": "quest"}, "split train.*row 0: has no column 'quest', only question, answer, chat"),
        ({"source": "chat"}, "column 'chat' holds list, not text"),
        ({"source": "question", "test": "exam"}, "split exam"),
        ({"source": "question", "target": "nothing"}, "have no answer: only a judge"),
        ({"path": "/no/such/place", "data_files": None}, "dataset /no/such/place, split train"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_named(parquet, options, problem):
    with pytest.raises(DataError, match=problem):
        make_task("dataset", **parquet | options)


class Rating(BaseHTTPRequestHandler):
    """A server that rates an answer by its length."""

    def do_GET(self):
        self._reply(
            {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "us"}]}
        )

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = asked["messages"][0]["content"].rpartition("Answer:\n\n")[2]
        text = "no idea" if answer == "?" else f"I give it {len(answer)}."
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._reply(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        )

    def _reply(self, body):
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = HTTPServer(("127.0.0.1", 0), Rating)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_served_model_is_a_judge(judge, tmp_path):
    directory = write(tmp_path, conversations)
    task = make_task("jsonl", directory=directory, judge={"url": judge})
    assert task.score([*task.test()] * 2, ["abc", "abcdefghij"]).quality == [0.3, 1.0]
    with pytest.raises(JudgeError, match="it replied 'no idea', not a number from 0 to 10"):
        task.score(task.test(), ["?"])
    with pytest.raises(JudgeError, match="not a number"):
        ServedJudge(judge).rate(["x"], ["eleven long"])


def test_an_unreachable_judge_is_named(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits between its attempts
    with pytest.raises(JudgeError, match=r"the judge at http://127\.0\.0\.1:9: "):
        ServedJudge("http://127.0.0.1:9").rate(["x"], ["y"])
