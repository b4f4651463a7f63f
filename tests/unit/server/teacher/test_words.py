"""Continued text as token ids: no space, special token or lost character comes between its parts."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.teacher.delivery import Delivery, after, last_border
from server.teacher.words import SpecialStrings, StudentWords, TeacherWords, UnusableTokenizer
from tests.helpers.fluent_teacher import END, byte_level

TEXT = "The demonstration: 你好 🙂"


def sentencepiece(**settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: a space before every text, and bytes for text without a token."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in "▁abcdefghijklmnopqrstuvwxyzTHDx.9,:;'-!?()0123456789BCEFGIJKLMNOPQRSUVWXYZ":
        vocabulary.setdefault(character, len(vocabulary))
    for token in ("▁a", "he", "▁T", "▁The"):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("▁", "a"), ("h", "e"), ("▁", "T"), ("▁T", "he")]
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("tokenizer", [byte_level([TEXT]), sentencepiece()], ids=["bytes", "sentencepiece"])
def test_parts_of_a_text_encode_to_the_ids_of_the_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    words = StudentWords(tokenizer)
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    for part in ("The dem", "onstration:", " 你", "好 ", "🙂"):
        encoded = words.encode(part)
        assert encoded.text == part
        assert words.decode(encoded.ids) == part
        ids += encoded.ids
    assert tokenizer.decode(ids) == f"Hello{TEXT}"


@pytest.mark.parametrize("tokenizer", [byte_level([TEXT]), sentencepiece()], ids=["bytes", "sentencepiece"])
async def test_a_server_is_asked_for_parts_of_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    async def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/detokenize":
            return {"prompt": tokenizer.decode(body["tokens"])}
        ids = tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return {"tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids)}

    words = TeacherWords()
    await words.prepare(ask)
    special = str(tokenizer.eos_token)
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    for part in ("The dem", f"onstration{special}:", special, "🙂"):
        ids += await words.encode(ask, part)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"HelloThe demonstration{special}:{special}🙂"


async def test_half_a_character_is_taken_off_the_end() -> None:
    tokenizer = byte_level([], 258)

    async def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/detokenize"
        return {"prompt": tokenizer.decode(body["tokens"])}

    words = TeacherWords()
    ids = tokenizer.encode("a🙂")
    assert len(ids) == 5
    for end in range(1, 5):
        assert await words.whole(ask, ids[:end]) == ids[:1]
    assert await words.whole(ask, ids) == ids


def test_names_of_special_tokens_are_cut_wherever_they_are() -> None:
    strings = SpecialStrings(["</s>", "<|end|>", "x"])
    assert strings.cut("a</s>b<|end|></s>") == ["a<", "/s>b<", "|end|><", "/s>"]
    assert strings.cut("x < y") == ["x < y"]
    assert strings.cut("") == []


def test_text_is_encoded_up_to_what_the_student_has_no_token_for() -> None:
    fast = Tokenizer(
        models.BPE(
            {character: place for place, character in enumerate("Helothquickbrwnfxjmpsvazydg. T9\nĠĊ")}, []
        )
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    words = StudentWords(PreTrainedTokenizerFast(tokenizer_object=fast))
    assert words.encode("no box 🙂 of").text == "no box "
    assert words.encode("no box").text == "no box"


def test_a_tokenizer_that_changes_texts_is_refused() -> None:
    tokenizer = byte_level([])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnusableTokenizer):
        StudentWords(tokenizer)


def test_a_tokenizer_may_compose_characters() -> None:
    tokenizer = byte_level([])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    words = StudentWords(tokenizer)
    assert words.encode("e\u0301!").text == "e\u0301!"
    delivery = Delivery(words, 2, to_the_end=False)
    assert words.decode(delivery.add("e\u0301!x")) == "é"
    assert delivery.rest == "!x"


@pytest.mark.parametrize(
    ("text", "border"),
    [("one two", 3), ("one two ", 7), ("one  two", 3), ("one", 0), ("", 0), (" one", 0), ("你" * 70, 6)],
)
def test_the_last_word_is_held_back(text: str, border: int) -> None:
    assert last_border(text) == border


def test_words_go_out_when_the_next_begins() -> None:
    words = StudentWords(byte_level(["demonstration of"]))
    delivery = Delivery(words, 20, to_the_end=False)
    assert delivery.add("demon") == []
    assert delivery.add("stration") == []
    assert words.decode(delivery.add(" of")) == "demonstration"
    assert words.decode(delivery.flush()) == " of"
    assert not delivery.full


def test_the_rest_of_a_text_follows_its_beginning() -> None:
    assert after("abc", "ab") == "c"
    assert after("e\u0301c", "é") == "c"
    assert END
