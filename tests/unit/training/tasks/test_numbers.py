"""The shipped task: splits that cannot leak, and references that accept all right answers and no others."""

import random
from itertools import islice, pairwise, product

import pytest
from num2words import num2words
from sacrebleu import corpus_bleu

from measuring.examples import Example, References
from training.tasks import make_task
from training.tasks.numbers import split_of
from training.tasks.spelling import cardinal, cardinals, clock, price


@pytest.fixture(scope="module")
def task():
    return make_task("numbers")


@pytest.fixture(scope="module")
def examples(task) -> list[Example]:
    return list(islice(task.train(0), 600))


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def answers(references: References) -> list[str]:
    return ["".join(choice) for form in references.forms for choice in product(*form)]


def test_held_out_sources_never_appear_in_training(task):
    valid, test = task.valid(), task.test()
    held_out = {example.source for example in valid + test}
    assert len(valid) == 500
    assert len(test) == 1000
    assert len(held_out) == 1500  # no source comes twice, and the two splits are disjoint
    for seed in range(3):
        sources = {example.source for example in islice(task.train(seed), 3000)}
        assert not sources & held_out
        assert {split_of(source) for source in sources} == {"train"}


def test_the_same_seed_gives_the_same_stream_and_another_gives_another(task):
    first, again, other = (list(islice(task.train(seed), 50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_every_sample_is_accepted_and_corruptions_are_not(examples):
    rng = random.Random(0)
    for example in examples:
        answer = example.references.sample(rng)
        assert example.references.accepts(answer)
        for wrong in (
            answer[:-1],
            answer + " ",
            answer[1:],
            answer.replace("e", "a", 1),
            answer.replace("un", "nu"),
        ):
            assert wrong == answer or not example.references.accepts(wrong)


def test_acceptance_agrees_with_enumeration(examples):
    for example in examples[:20]:
        listed = answers(example.references)
        assert len(listed) == len(example.references)
        assert all(map(example.references.accepts, listed))


def test_answers_to_other_sources_are_refused(examples):
    refused = [not a.references.accepts(b.references.first()) for a, b in pairwise(examples)]
    assert sum(refused) > 0.99 * len(refused)


def test_most_sentences_leave_free_choices(examples):
    counts = sorted(len(example.references) for example in examples)
    assert counts[len(counts) // 10] >= 4


def test_similarity_is_the_best_over_all_answers(examples):
    rng = random.Random(1)
    few = [example for example in examples if len(example.references) <= 8]
    assert len(few) > 10
    for example in few[:10]:
        text = "".join(c for c in example.references.sample(rng) if rng.random() > 0.1)
        distances = {answer: levenshtein(text, answer) for answer in answers(example.references)}
        nearest = min(distances.values())
        expected = max(1 - d / max(len(text), len(a)) for a, d in distances.items() if d == nearest)
        assert example.references.similarity(text) == pytest.approx(expected)


def test_similarity_is_computed_as_by_hand():
    references = References((((("ab", "xyz")), ("c",)),))
    assert references.similarity("abc") == 1.0
    assert references.similarity("abd") == pytest.approx(1 - 1 / 3)
    assert references.similarity("xyzc") == 1.0
    assert references.similarity("") == 0.0


def test_thousands_are_spelled_as_num2words_does():
    for n in (*range(1000, 1003), 1101, 2000, 6000, 7017, 16_016, 21_001, 30_030, 61_100, 99_999):
        assert cardinal(n) == num2words(n, lang="de")


def test_numbers_are_spelled_as_expected():
    assert cardinals(347812) == ("dreihundertsiebenundvierzigtausendachthundertzwölf",)
    assert cardinals(105) == ("einhundertfünf", "hundertfünf")
    times = dict(clock(random.Random(seed)) for seed in range(3000))
    assert times["2:30 pm"] == times["14:30"] == ("vierzehn Uhr dreißig", "halb drei")
    assert times["12:45"] == ("zwölf Uhr fünfundvierzig", "Viertel vor eins")
    amounts = dict(price(random.Random(seed)) for seed in range(30000))
    assert amounts["€3.50"] == ("drei Euro fünfzig", "drei Euro und fünfzig Cent")


def test_references_survive_json(examples):
    references = examples[0].references
    assert References.from_json(references.to_json()) == references


def test_jsonl_names_the_line_that_is_wrong(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"source": "a", "target": "b"}\n')
    bad.write_text('{"source": "a", "target": "b"}\n{"source": "a"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        make_task("jsonl", train=str(bad), valid=str(good), test=str(good))


def test_jsonl_keeps_held_out_sources_out_of_training(tmp_path):
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text('{"source": "a", "target": "b"}\n{"source": "c", "target": "d"}\n')
    held.write_text('{"source": "a", "target": "b"}\n')
    task = make_task("jsonl", train=str(train), valid=str(held), test=str(held))
    assert {example.source for example in islice(task.train(0), 10)} == {"c"}
    assert task.score(task.test(), ["b"]).quality == [1.0]


def test_an_unknown_task_is_named():
    with pytest.raises(KeyError, match="nosuch"):
        make_task("nosuch")


def test_jsonl_keeps_examples_for_the_router_alone(tmp_path):
    lines = "".join(f'{{"source": "{i}", "target": "t"}}\n' for i in range(10))
    (tmp_path / "train.jsonl").write_text(lines)
    for name in ("valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"source": "held", "target": "t"}\n')
    task = make_task("jsonl", directory=str(tmp_path), router=4)
    trained = {example.source for example in islice(task.train(0), 30)}
    routed = {example.source for example in islice(task.router(0), 30)}
    assert (len(trained), len(routed), trained & routed) == (6, 4, set())
    with pytest.raises(ValueError, match="cannot keep 10 of 10"):
        make_task("jsonl", directory=str(tmp_path), router=10)


def test_corpus_metrics_are_taken_of_the_whole_set(tmp_path):
    rows = ["the cat sat on the mat today", "a dog ran over the green hill there"]
    for name in ("train", "valid", "test"):
        lines = (f'{{"source": "{name}{i}", "target": "{row}"}}\n' for i, row in enumerate(rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    task = make_task("jsonl", directory=str(tmp_path), metric="bleu")
    answers = [rows[0], "nothing of it"]
    each = task.score(task.test(), answers).quality
    whole = task.quality(task.test(), answers, each)
    assert whole == pytest.approx(corpus_bleu(answers, [rows]).score / 100)
    assert whole != pytest.approx(sum(each) / 2, abs=1e-3)
    assert task.quality(task.test(), rows, [1.0, 1.0]) == pytest.approx(1.0)
