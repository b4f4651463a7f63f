"""A teacher's answers are kept: asked for once, the same when read again, bounded, whole after any end."""

import sqlite3
from dataclasses import replace

import httpx
import pytest
import torch

from tests.helpers.served_teacher import BATCH, VISIBLE, VLLM, client
from training.kept_completions import KeptCompletions
from training.method_config import SeqKDConfig
from training.methods import SeqKD
from training.model_config import Shape
from training.models import new_model
from training.served import ServedTeacher, ServerError, VLLMServer
from training.teacher_cache import TeacherCache, key_of

DEMONSTRATION = replace(BATCH, comes_again=True)
MEGABYTE = 1_000_000


@pytest.fixture
def file(tmp_path):
    return tmp_path / "work" / "teacher.sqlite"


def test_kept_answers_are_found_by_another_process(file):
    TeacherCache(file, MEGABYTE).put({b"a": b"1", b"b": b"2"})
    assert TeacherCache(file, MEGABYTE).get([b"b", b"c", b"a"]) == [b"2", None, b"1"]


def test_the_least_used_entries_are_dropped_and_the_file_stays_within_its_bound(file):
    cache = TeacherCache(file, MEGABYTE // 5)
    for number in range(200):
        cache.put({str(number).encode(): bytes(4000)})
        cache.get([b"0"])
    assert cache.get([b"0"]) == [bytes(4000)]
    assert cache.get([b"1"]) == [None]
    assert cache.get([b"199"]) == [bytes(4000)]
    assert file.stat().st_size < MEGABYTE // 5 + 40_000


def test_a_broken_file_is_started_anew(file, capsys):
    file.parent.mkdir()
    file.write_bytes(b"not a database, but long enough to look like the head of one" * 20)
    cache = TeacherCache(file, MEGABYTE)
    cache.put({b"a": b"1"})
    assert cache.get([b"a"]) == [b"1"]
    assert "unreadable, started again empty" in capsys.readouterr().out


def test_an_entry_is_whole_or_not_there(file):
    """This holds whatever happens before the end of `put`, for example if the process is killed."""
    cache = TeacherCache(file, MEGABYTE)
    with pytest.raises(sqlite3.Error):
        cache.put({b"a": b"1", b"b": None})
    assert len(TeacherCache(file, MEGABYTE)) == 0


def test_keys_tell_everything_apart():
    parts = [
        ("u", "m", 5, [1, 2], 1),
        ("u", "m", 5, [1], 1),
        ("u", "m", 6, [1, 2], 1),
        ("u", "n", 5, [1, 2], 1),
    ]
    assert len({key_of(*each) for each in [*parts, ("u", "m", 5, [1, 2], 2)]}) == 5


def asked(vllm):
    """Number of prompts that were scored so far."""
    return sum(len(body["prompt"]) for path, body in vllm.asked if path == "/v1/completions")


def teacher(vllm, file, top=5):
    server = VLLMServer("teacher", "http://there", None, client(vllm))
    return ServedTeacher(server, top, TeacherCache(file, MEGABYTE))


@pytest.fixture
def vllm(tokenizer):
    return VLLM(new_model(Shape(hidden=32, layers=1, heads=1, feed_forward=32), tokenizer, 1))


def test_a_served_teacher_scores_a_demonstration_once(vllm, file):
    first = teacher(vllm, file)
    ids, log_probs = first.likeliest(DEMONSTRATION)
    assert asked(vllm) == 2
    again = first.likeliest(DEMONSTRATION)
    assert asked(vllm) == 3  # one row, to check that it is the same teacher
    first.likeliest(DEMONSTRATION)
    assert asked(vllm) == 3
    plain = ServedTeacher(VLLMServer("teacher", "http://there", None, client(vllm)), 5).likeliest(BATCH)
    for kept in (again, first.likeliest(DEMONSTRATION), plain):
        assert torch.equal(kept[0], ids)
        assert torch.equal(kept[1], log_probs)


def test_answers_kept_by_a_name_are_found_at_another_address(vllm, file):
    for port, times in ((1, 2), (2, 3)):  # the second time one row, to check that it is the same teacher
        server = VLLMServer("teacher", f"http://there:{port}", None, client(vllm))
        ServedTeacher(server, 5, TeacherCache(file, MEGABYTE), "directory").likeliest(DEMONSTRATION)
        assert asked(vllm) == times


def test_own_completions_are_not_kept(vllm, file):
    own = teacher(vllm, file)
    own.likeliest(BATCH)
    own.likeliest(BATCH)
    assert asked(vllm) == 4


def test_other_answers_of_the_same_prompt_are_asked_for(vllm, file):
    served = teacher(vllm, file)
    served.likeliest(DEMONSTRATION)
    ids = DEMONSTRATION.ids.clone()
    ids[0, 2] = 9
    served.likeliest(replace(DEMONSTRATION, ids=ids))
    assert asked(vllm) == 4  # the row that was asked again is another one


def test_another_teacher_behind_the_same_url_is_noticed(vllm, file, tokenizer, capsys):
    kept = teacher(vllm, file).likeliest(DEMONSTRATION)[1]
    other = VLLM(new_model(Shape(hidden=32, layers=1, heads=1, feed_forward=32), tokenizer, 7))
    other.model.get_output_embeddings().weight.data *= 20
    now = teacher(other, file).likeliest(DEMONSTRATION)[1]
    assert not torch.allclose(kept, now)
    plain = ServedTeacher(VLLMServer("teacher", "http://there", None, client(other)), 5).likeliest(BATCH)[1]
    assert torch.equal(now, plain)
    assert "its cached answers are asked for again" in capsys.readouterr().out


def test_half_an_answer_keeps_nothing(vllm, file):
    def answer(request):
        reply = vllm(request)
        if request.url.path == "/v1/completions":
            return httpx.Response(200, json={"choices": reply.json()["choices"][:1]})
        return reply

    with pytest.raises(ServerError, match="1 choices for 2 prompts"):
        teacher(answer, file).likeliest(DEMONSTRATION)
    assert len(TeacherCache(file, MEGABYTE)) == 0


@pytest.fixture
def seqkd(file, tokenizer):
    model = new_model(Shape(hidden=32, layers=1, heads=1, feed_forward=32), tokenizer, 1).eval()
    method = SeqKD(SeqKDConfig(type="seqkd"), VISIBLE, model, end=256, longest=6)
    method.kept = KeptCompletions(TeacherCache(file, MEGABYTE), "weights")
    return method


@pytest.fixture
def written(monkeypatch):
    """The prompts that a teacher completed, in order."""
    import training.kept_completions as module

    prompts, complete = [], module.complete

    def counted(model, asked, *rest, **more):
        prompts.extend(asked)
        return complete(model, asked, *rest, **more)

    monkeypatch.setattr(module, "complete", counted)
    return prompts


def test_a_teacher_in_process_completes_a_prompt_once(seqkd, written):
    student = seqkd.teacher
    plain = seqkd.prepare(student, BATCH)
    first = seqkd.prepare(student, DEMONSTRATION)
    again = seqkd.prepare(student, DEMONSTRATION)
    assert written == [[5, 6], [7]]
    for batch in (first, again):
        assert torch.equal(batch.ids, plain.ids)
        assert torch.equal(batch.answer, plain.answer)


def test_a_completion_that_was_cut_short_is_written_again(seqkd, written):
    seqkd.longest = 2
    short = seqkd.prepare(seqkd.teacher, DEMONSTRATION)
    assert short.positions == 4
    seqkd.longest = 5
    longer = seqkd.prepare(seqkd.teacher, DEMONSTRATION)
    assert longer.positions == 10
    assert written == [[5, 6], [7]] * 2
    seqkd.longest = 2
    assert torch.equal(seqkd.prepare(seqkd.teacher, DEMONSTRATION).targets, short.targets)
    assert len(written) == 4


def test_drawn_completions_are_drawn_anew(seqkd, written):
    seqkd.config = SeqKDConfig(type="seqkd", temperature=1.0)
    seqkd.prepare(seqkd.teacher, DEMONSTRATION)
    assert written == []
