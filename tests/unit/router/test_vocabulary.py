"""Differences between two tokenizers that are found."""

import asyncio
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from router.vocabulary import OTHER_SPLIT, Differences, cleaned, differences, questions
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError
from server.teacher.vocabulary import SameVocabulary
from tests.helpers.fake_teacher import Server

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TEXTS = ["the lazy dog and the quick brown fox", "über die Straße, naïve façade", "你好世界 привет мир 🙂🙃"]


@cache
def _trained() -> str:
    """A byte-level tokenizer as JSON, with many tokens that are parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def tokenizer(change: Callable[[dict[str, Any]], None] = lambda _: None) -> PreTrainedTokenizerFast:
    """The tokenizer, with a change to its JSON."""
    content = json.loads(_trained())
    change(content)
    made = Tokenizer.from_str(json.dumps(content))
    special = [token["content"] for token in content["added_tokens"]]
    names = {"eos_token": "<|end|>", "additional_special_tokens": special}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def swapped(one: int, other: int) -> Callable[[dict[str, Any]], None]:
    """A change by which two ids have each other's token; the merges stay."""

    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        names = {token_id: token for token, token_id in vocabulary.items()}
        vocabulary[names[one]], vocabulary[names[other]] = other, one

    return change


def named_otherwise(content: dict[str, Any]) -> None:
    """A special token with another text."""
    content["added_tokens"][2]["content"] = "<|helper|>"
    vocabulary = content["model"]["vocab"]
    vocabulary["<|helper|>"] = vocabulary.pop("<|assistant|>")


def test_a_tokenizer_is_the_same_as_itself() -> None:
    assert differences(tokenizer(), tokenizer()) == Differences(None, None)


@pytest.mark.parametrize("seed", range(40))
def test_two_swapped_ids_are_found(seed: int) -> None:
    ours = tokenizer()
    ids = sorted(set(ours.get_vocab().values()) - set(ours.all_special_ids))
    one, other = random.Random(seed).sample(ids, 2)
    problem = differences(ours, tokenizer(swapped(one, other))).ids
    assert problem is not None
    assert any(f"the token {token_id} is " in problem for token_id in (one, other))


def test_another_special_token_is_found() -> None:
    problem = differences(tokenizer(), tokenizer(named_otherwise)).ids or ""
    assert "'<|assistant|>' is a token here only" in problem
    for question in questions(tokenizer()):
        if found := question.difference(question.answered_by(tokenizer(named_otherwise))):
            assert found.startswith("the token 2 is '<|helper|>' there")
            return
    raise AssertionError("no question told them apart")


def test_parts_of_characters_are_told_apart() -> None:
    """Decoded alone, each part is a replacement character."""
    ours = tokenizer()
    one, other = (ours.get_vocab()[token] for token in ("½", "ł"))  # the bytes BD and 9F
    assert ours.decode([one]) == ours.decode([other]) == "\ufffd"
    assert differences(ours, tokenizer(swapped(one, other))).ids is not None


def test_neighbours_whose_texts_begin_alike_are_told_apart() -> None:
    """The two tokens in a row are the same text in both orders."""

    def runs(content: dict[str, Any]) -> None:
        content["model"]["vocab"] |= {"==": 400, "=====": 401}
        content["model"]["merges"] += [["=", "="]]

    def other_order(content: dict[str, Any]) -> None:
        runs(content)
        content["model"]["vocab"] |= {"==": 401, "=====": 400}

    assert "400" in (differences(tokenizer(runs), tokenizer(other_order)).ids or "")


def merges(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


def normaliser(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFKC"}


def lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def digits(content: dict[str, Any]) -> None:
    split = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}


def bos(content: dict[str, Any]) -> None:
    processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    content["post_processor"] = json.loads(processor.__getstate__())


def stripping(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["rstrip"] = True


OTHER_WAYS = [merges, normaliser, lower_case, prefix_space, bos, stripping]


@pytest.mark.parametrize("change", OTHER_WAYS, ids=lambda change: change.__name__)
def test_other_ways_to_split_a_text_are_found(change: Callable[[dict[str, Any]], None]) -> None:
    """The ids are the same, so the two can be a pair."""
    found = differences(tokenizer(), tokenizer(change))
    assert found.ids is None
    assert "there and" in (found.texts or "")


def test_digits_that_are_split_are_found() -> None:
    def numbers(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["12"] = 400
        content["model"]["merges"].append(["1", "2"])

    def both(content: dict[str, Any]) -> None:
        numbers(content)
        digits(content)

    found = differences(tokenizer(numbers), tokenizer(both))
    assert found.ids is None
    assert found.texts is not None


def test_a_token_that_only_one_of_them_has_is_named() -> None:
    more = tokenizer()
    more.add_tokens([AddedToken("<think>", special=True)])
    assert differences(tokenizer(), more).ids == "'<think>' is a token there only"
    assert differences(more, tokenizer()).ids == "'<think>' is a token here only"


def test_cleaned_text_is_no_difference() -> None:
    """Versions of `transformers` differ in the clean-up, tokenizers do not."""
    assert cleaned([" .", "a n't", " ' "]) == [".", "an't", "'"]
    (first, *_) = questions(tokenizer())
    theirs = cleaned(first.texts)
    answer = "".join(f"{text}{first.separator}" for text in theirs)
    assert first.difference({"prompt": answer}) is None


@pytest.mark.parametrize("answer", [{}, {"prompt": None, "tokens": None}, {"prompt": "", "tokens": []}])
def test_an_unusable_answer_is_a_difference(answer: dict[str, Any]) -> None:
    assert all(question.difference(answer) for question in questions(tokenizer()))


# A server


async def refusal(theirs: PreTrainedTokenizerFast, rows: int = 0) -> str | None:
    """The reason for refusing a server with a tokenizer; None if it is accepted."""
    check = SameVocabulary(tokenizer(), rows)
    async with Server() as server:
        server.tokenizer = theirs
        async with Teacher(server.url, model="big", breaker=Breaker(3, 60.0), vocabulary=400) as teacher:
            (error,) = await asyncio.gather(check(teacher), return_exceptions=True)
    if error is None:
        return None
    assert isinstance(error, TeacherError)
    assert error.reason == "nonsense"
    assert "\n" not in str(error)
    return str(error).replace(teacher.name, "HOST")


async def test_a_server_of_the_same_vocabulary_is_taken() -> None:
    assert await refusal(tokenizer()) is None


async def test_a_server_may_have_other_rows() -> None:
    assert await refusal(tokenizer(), rows=1000) is None


@pytest.mark.parametrize("change", OTHER_WAYS, ids=lambda change: change.__name__)
async def test_a_server_that_splits_text_otherwise_is_taken_with_a_warning(
    change: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    """For example a base model and its chat model, one of which puts a token in front of texts."""
    assert await refusal(tokenizer(change)) is None
    (warning,) = caplog.messages
    assert OTHER_SPLIT in warning
    assert "there and" in warning


async def test_a_server_of_another_vocabulary_is_refused_with_the_first_difference() -> None:
    ours = tokenizer()
    one, other = ours.get_vocab()["Ġthe"], ours.get_vocab()["!"]
    said = await refusal(tokenizer(swapped(one, other)))
    assert said == (
        "the teacher at HOST has a different vocabulary from the student: "
        f"the token {other} is ' the' there and '!' here"
    )


async def test_a_token_in_a_spare_row_of_the_student_is_found() -> None:
    more = tokenizer()
    more.add_tokens([AddedToken("<think>", special=True)])
    said = await refusal(more, rows=500) or ""
    assert f"the token {len(more) - 1} is '<think>' there and '' here" in said
