from collections.abc import Callable

import pytest
from vllm.sampling_params import RepetitionDetectionParams

from server.completion import Completion, Piece
from server.exchange import Report
from server.vllm_api import CompletionOutput, Logprob, RequestOutputKind, SamplingParams

EOS = 256  # end of sequence of the `tokenizer` fixture, whose other ids are bytes
DELTA, CUMULATIVE, FINAL_ONLY = (
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
    RequestOutputKind.FINAL_ONLY,
)

Begin = Callable[..., Completion]


@pytest.fixture
def begin(tokenizer) -> Begin:
    """A function that begins a completion of the prompt "Hi" with given sampling parameters."""

    def begin(**params: object) -> Completion:
        params = {"max_tokens": 100, "output_kind": DELTA} | params
        return Completion(tokenizer, list(b"Hi"), SamplingParams(**params), 0, Report())

    return begin


def student(completion: Completion, text: str | bytes, **ending: object) -> CompletionOutput:
    completion.extend(piece(text, **ending), "student")
    return completion.output()


def teacher(completion: Completion, text: str | bytes, **ending: object) -> CompletionOutput:
    """Add a teacher's call with one piece."""
    completion.report.open_span("teacher")
    completion.extend(piece(text, **ending), "teacher")
    return completion.output()


def piece(text: str | bytes, **ending: object) -> Piece:
    return Piece(list(text.encode() if isinstance(text, str) else text), **ending)


# Text


def test_pieces_of_both_models_are_one_text(begin):
    completion = begin(output_kind=CUMULATIVE)
    student(completion, "two and ")
    teacher(completion, "twen")
    output = student(completion, "ty")
    assert output.text == "two and twenty"
    assert output.token_ids == list(b"two and twenty")
    assert completion.token_ids == output.token_ids


def test_a_character_may_be_written_by_both_models(begin):
    euro = "€".encode()  # three bytes, so three tokens
    completion = begin()
    assert student(completion, b"5 " + euro[:1]).text == "5 "
    assert teacher(completion, euro[1:2]).text == ""
    assert student(completion, euro[2:] + b"!").text == "€!"


def test_every_delta_is_whole_characters(begin):
    text = "dreiundzwanzig Äpfel für 5 € 🙂"
    completion = begin()
    deltas = [
        (student if i % 2 else teacher)(completion, bytes([byte])).text
        for i, byte in enumerate(text.encode())
    ]
    assert "".join(deltas) == text
    assert "\ufffd" not in "".join(deltas)


def test_decoding_may_be_left_to_the_client(begin):
    completion = begin(detokenize=False)
    output = teacher(completion, "abc", finish_reason="length")
    assert (output.text, output.token_ids) == ("", list(b"abc"))


# How a completion ends


def test_a_models_own_stop_token_ends_the_completion_and_is_not_shown(begin):
    for write in (student, teacher):
        completion = begin(stop_token_ids=[ord(".")])
        output = write(completion, "end.", finish_reason="stop", stop_reason=ord("."))
        assert (output.text, output.token_ids) == ("end", list(b"end."))
        assert (output.finish_reason, output.stop_reason) == ("stop", ord("."))
        assert completion.finished


def test_the_end_of_sequence_is_a_token_without_text(begin):
    completion = begin()
    teacher(completion, "ok")
    completion.extend(Piece([EOS], finish_reason="stop"), "teacher")
    output = completion.output()
    assert (output.text, output.token_ids, output.finish_reason) == ("", [EOS], "stop")
    assert output.stop_reason is None


def test_an_ending_may_come_without_a_token(begin):
    completion = begin()
    student(completion, "done")
    output = teacher(completion, "", finish_reason="stop")
    assert (output.text, output.token_ids, output.finish_reason) == ("", [], "stop")


def test_max_tokens_counts_both_models(begin):
    completion = begin(max_tokens=5)
    assert student(completion, "ab").finish_reason is None
    assert completion.tokens_left == 3
    assert teacher(completion, "cd", finish_reason="length").finish_reason is None  # the span is full
    assert student(completion, "e", finish_reason="length").finish_reason == "length"
    assert completion.tokens_left == 0


def test_a_full_span_is_no_ending(begin):
    completion = begin()
    teacher(completion, "abcd", finish_reason="length")
    assert not completion.finished


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
def test_any_other_ending_by_the_engine_is_passed_on(begin, reason):
    assert student(begin(), "ab", finish_reason=reason).finish_reason == reason


def test_a_stop_at_the_last_token_is_a_stop(begin):
    assert student(begin(max_tokens=3), "abc", finish_reason="stop").finish_reason == "stop"
    assert student(begin(max_tokens=3, stop=["c"]), "abc").finish_reason == "stop"


# Stop strings


@pytest.mark.parametrize("border", range(1, 8))
def test_a_stop_string_may_cross_a_border_anywhere(begin, border):
    completion, text = begin(stop=["STOP"]), "one STOP two"
    shown = student(completion, text[:border]).text
    assert not completion.finished
    output = teacher(completion, text[border:])
    assert shown + output.text == "one "
    assert (output.finish_reason, output.stop_reason) == ("stop", "STOP")
    assert completion.token_ids == list(b"one STOP")  # text after it is dropped


def test_a_stop_string_is_held_back_until_it_is_none(begin):
    completion = begin(stop=["STOP"])
    deltas = [student(completion, character).text for character in "a STATION"]
    assert "".join(deltas) == "a STAT"  # its last three characters might begin a stop
    assert student(completion, ".", finish_reason="stop").text == "ION"


def test_a_stop_string_can_be_included(begin):
    completion = begin(stop=["STOP"], include_stop_str_in_output=True)
    shown = student(completion, "one ST").text
    output = teacher(completion, "OP two")
    assert shown + output.text == "one STOP"
    assert output.stop_reason == "STOP"
    assert completion.token_ids == list(b"one STOP")


def test_a_stop_token_is_shown_if_stops_are_included(begin):
    completion = begin(stop_token_ids=[ord(".")], include_stop_str_in_output=True)
    assert teacher(completion, "end.", finish_reason="stop").text == "end."


def test_the_stop_string_that_ends_first_wins(begin):
    assert student(begin(stop=["cde", "bc"]), "abcdef").stop_reason == "bc"


def test_min_tokens_lets_stop_strings_pass(begin):
    completion = begin(stop=["x"], min_tokens=4)
    assert student(completion, "axb").finish_reason is None
    assert teacher(completion, "cd").finish_reason is None
    output = student(completion, "ex")
    assert output.stop_reason == "x"
    assert completion.token_ids == list(b"axbcdex")


def test_a_stop_string_in_the_prompt_does_not_count(begin):
    completion = begin(stop=["Hi!"])  # the prompt is "Hi"
    assert student(completion, "!").finish_reason is None


# Outputs


@pytest.mark.parametrize(
    ("kind", "texts", "ids"),
    [
        (DELTA, ["ab", "cd", "e"], [b"ab", b"cd", b"e"]),
        (CUMULATIVE, ["ab", "abcd", "abcde"], [b"ab", b"abcd", b"abcde"]),
    ],
)
def test_outputs_are_deltas_or_the_text_so_far(begin, kind, texts, ids):
    completion = begin(output_kind=kind)
    outputs = [student(completion, "ab"), teacher(completion, "cd"), student(completion, "e")]
    assert [output.text for output in outputs] == texts
    assert [output.token_ids for output in outputs] == [list(i) for i in ids]


def test_a_final_output_holds_everything(begin):
    completion = begin(output_kind=FINAL_ONLY, stop=["!"])
    completion.extend(piece("ab"), "student")
    completion.report.open_span("teacher")
    completion.extend(piece("cd!e"), "teacher")
    output = completion.output()
    assert (output.text, output.token_ids) == ("abcd", list(b"abcd!"))
    assert (output.index, output.finish_reason, output.stop_reason) == (0, "stop", "!")


def test_several_pieces_can_be_handed_out_at_once(begin):
    completion = begin()
    completion.extend(piece("ab"), "student")
    completion.extend(piece("cd"), "student")
    output = completion.output()
    assert (output.text, output.token_ids) == ("abcd", list(b"abcd"))
    output = completion.output()
    assert (output.text, output.token_ids) == ("", [])


def test_handed_out_tokens_do_not_change_later(begin):
    completion = begin(output_kind=CUMULATIVE)
    first = student(completion, "ab")
    student(completion, "cd")
    assert first.token_ids == list(b"ab")


def test_a_choice_keeps_its_index(tokenizer):
    completion = Completion(tokenizer, [], SamplingParams(max_tokens=9), 3, Report())
    assert student(completion, "a").index == 3


# Log-probabilities


def logprobs(text: str, *values: float) -> list[dict[int, Logprob]]:
    """Log-probabilities of each token with their texts: the written token, and "?" as the alternative."""
    return [
        {ord(c): Logprob(v, decoded_token=c), ord("?"): Logprob(-9.0, decoded_token="?")}
        for c, v in zip(text, values, strict=True)
    ]


def test_log_probabilities_are_those_of_the_writer(begin):
    completion = begin(logprobs=1, output_kind=CUMULATIVE)
    student(completion, "ab", logprobs=logprobs("ab", -1.0, -2.0))
    output = teacher(completion, "c", logprobs=logprobs("c", -0.5))
    assert [entry[token].logprob for entry, token in zip(output.logprobs, b"abc", strict=True)] == [
        -1.0,
        -2.0,
        -0.5,
    ]
    assert all(entry[ord("?")].logprob == -9.0 for entry in output.logprobs)
    assert output.cumulative_logprob == -3.5


def test_log_probabilities_of_a_delta_are_its_own(begin):
    completion = begin(logprobs=1)
    student(completion, "ab", logprobs=logprobs("ab", -1.0, -2.0))
    output = teacher(completion, "c", logprobs=logprobs("c", -0.5))
    assert output.logprobs == logprobs("c", -0.5)
    assert output.cumulative_logprob == -3.5


def test_the_escalation_tokens_log_probability_is_dropped(begin):
    """A piece that asks has lost its last token, but not that token's log-probabilities."""
    completion = begin(logprobs=1)
    student(completion, "ab", logprobs=logprobs("abZ", -1.0, -2.0, -7.0), asks=True)
    output = teacher(completion, "c", logprobs=logprobs("c", -0.5))
    assert output.logprobs == logprobs("c", -0.5)
    assert output.cumulative_logprob == -3.5


def test_log_probabilities_have_texts(begin):
    """The last byte of a character, whoever wrote it, has the text of the whole character."""
    completion = begin(logprobs=1, output_kind=CUMULATIVE)
    first, middle, last = [{byte: Logprob(-1.0), ord("?"): Logprob(-9.0)} for byte in "€".encode()]
    student(completion, b"a", logprobs=[{ord("a"): Logprob(-1.0)}])
    student(completion, "€".encode()[:1], logprobs=[first])
    output = teacher(completion, "€".encode()[1:], logprobs=[middle, last])
    texts = [[entry.decoded_token for entry in position.values()] for position in output.logprobs]
    assert texts == [["a"], ["", "?"], ["", "?"], ["€", "?"]]


def test_log_probabilities_end_with_the_stop_string(begin):
    completion = begin(logprobs=1, stop=["b"], output_kind=FINAL_ONLY)
    output = teacher(completion, "abc", logprobs=logprobs("abc", -1.0, -2.0, -4.0))
    assert len(output.logprobs) == len(output.token_ids) == 2
    assert output.cumulative_logprob == -3.0


def test_there_are_no_log_probabilities_unless_asked_for(begin):
    output = student(begin(), "ab", logprobs=None)
    assert (output.logprobs, output.cumulative_logprob) == (None, None)


# The report


def test_the_report_says_who_wrote_what(begin):
    completion = begin()
    student(completion, "abc")
    teacher(completion, "de")
    student(completion, "f")
    teacher(completion, "g")
    assert completion.report.completion_tokens == 7
    assert completion.report.tokens == 3
    assert completion.report.spans == [[3, 5], [6, 7]]


def test_a_span_grows_with_its_pieces(begin):
    completion = begin()
    student(completion, "abc")
    teacher(completion, "d")
    completion.extend(piece("ef"), "teacher")
    assert completion.report.spans == [[3, 6]]
    assert completion.report.tokens == 3


def test_tokens_after_a_stop_string_belong_to_no_model(begin):
    completion = begin(stop=["e"])
    student(completion, "abc")
    teacher(completion, "defgh")
    assert completion.report.completion_tokens == 5
    assert completion.report.tokens == 2
    assert completion.report.spans == [[3, 5]]


# Repetitions


def repetition(**params: int) -> dict[str, object]:
    return {"repetition_detection": RepetitionDetectionParams(**params)}


@pytest.mark.parametrize("border", range(1, 8))
def test_a_repetition_ends_the_completion_wherever_the_border_is(begin, border):
    """The text is three times "ab". Tokens after it are neither charged nor shown."""
    text = "xababab" + "abab"
    completion = begin(**repetition(max_pattern_size=2, min_pattern_size=2, min_count=3))
    student(completion, text[:border])
    output = teacher(completion, text[border:]) if not completion.finished else completion.output()
    assert bytes(completion.token_ids).decode() == "xababab"
    assert (completion.finish_reason, completion.stop_reason) == ("repetition", "repetition_detected")
    assert completion.report.tokens == 7 - border
    assert output.finish_reason == "repetition"


def test_the_first_of_several_endings_ends_the_completion(begin):
    """The order is vLLM's: an end token, a stop string, the length, then `min_tokens`, then a repetition."""
    twice = repetition(max_pattern_size=1, min_count=2)
    for text, params, reason in (
        ("aa", {"max_tokens": 2}, "length"),
        ("aa", {"stop": ["aa"]}, "stop"),
        ("aa", {"stop_token_ids": [ord("a")]}, "stop"),
        ("aab", {"min_tokens": 3}, None),
        ("aabb", {"min_tokens": 3}, "repetition"),
        ("ab", {}, None),
    ):
        completion = begin(**twice, **params)
        student(completion, text)
        assert completion.finish_reason == reason, (text, params)


def test_without_a_pattern_repetitions_are_not_detected(begin):
    completion = begin(**repetition())
    student(completion, "aaaaaaaa")
    assert not completion.finished
