"""Trains a small byte-level BPE tokenizer in the Hugging Face layout, and encodes prompts and answers.

Digits stay single tokens, so that a number is read digit by digit. Bytes that neither the training data nor
printable ASCII uses have no id and become `<|unk|>`: in a small vocabulary (480 ids in the demo), merges are
worth more.
"""

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from measuring.chats import Source, messages_of, shown
from measuring.json_lines import DataError
from router.reserved import visible_rows

UNK = "<|unk|>"
END = "<|end|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SHOWN_SOURCE = 40
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], size: int, context: int) -> PreTrainedTokenizerBase:
    """Train a tokenizer of `size` ids on the texts, with a chat template.

    Args:
        texts: the texts that merges are learned on.
        size: number of ids.
        context: longest text of the models, in tokens.

    Raises:
        ValueError: the data has too little variety for `size` ids.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    ascii_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        string.digits + string.ascii_letters + string.punctuation + " \n"
    )
    pieces = [piece for piece, _ in ascii_bytes]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[UNK, END, SYSTEM, USER, ASSISTANT],
            initial_alphabet=sorted(set("".join(pieces))),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the data is enough for {tokenizer.get_vocab_size()} token ids, not for {size}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory."""
    return AutoTokenizer.from_pretrained(directory)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer as `router.vocabulary` expects it. No model reads its texts, so they may be very long."""

    whole: PreTrainedTokenizerBase

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of tokens such as the end of a sequence."""
        return self.whole.all_special_ids

    def get_vocab(self) -> dict[str, int]:
        """The id of every token, added tokens included."""
        return self.whole.get_vocab()

    def decode(self, token_ids: list[int]) -> str:
        """The ids as text."""
        return str(self.whole.decode(token_ids))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The text as ids, without a warning that it is too long for a model."""
        return self.whole.encode(text, add_special_tokens=add_special_tokens, verbose=False)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> list[list[int]]:
    """Token ids of each source as a chat, ready for the answer.

    Raises:
        DataError: the chat template cannot render a source, or a source's prompt is empty.
    """
    ids = tokenizer(rendered(tokenizer, sources), add_special_tokens=False)["input_ids"]
    for source, prompt in zip(sources, ids, strict=True):
        if not prompt:
            raise DataError(f"the source {shown(source)[:SHOWN_SOURCE]!r} makes an empty prompt")
    return ids


def rendered(tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> list[str]:
    """The text of each source's prompt.

    Raises:
        DataError: the chat template cannot render a source.
    """
    chats = list(map(messages_of, sources))
    try:
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program, and may fail in any way
        problem = " ".join(str(error).split())
        raise DataError(f"the chat template fails: {type(error).__name__}: {problem}") from error
    return cast(list[str], texts)  # several chats, untokenised, give a list of texts


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: list[str]) -> list[list[int]]:
    """Token ids of each answer, ended by the end-of-sequence token."""
    ended = []
    for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]:
        ended.append([*ids, tokenizer.eos_token_id])
    return ended


def decode_answer(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> str:
    """The text of one answer, without special tokens."""
    return cast(str, tokenizer.decode(answer, skip_special_tokens=True))


def decode_answers(tokenizer: PreTrainedTokenizerBase, answers: list[list[int]]) -> list[str]:
    """The text of each answer, without special tokens."""
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def visible_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids that may be written, see `router.reserved.visible_rows`."""
    return visible_rows(tokenizer.get_vocab().values())
