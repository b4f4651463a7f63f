"""A teacher with a tokenizer of its own that knows one text by heart. It answers as a stock vLLM server does.

Its text comes token by token in whole characters: a part of a character comes with the token that ends it.
"""

from collections.abc import Iterable
from typing import Any

from aiohttp import web
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.fake_teacher import Server, begin_events, choice, event

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(texts: Iterable[str], size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges of these texts; it can encode every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=START, chat_template=TEMPLATE
    )


class FluentTeacher(Server):
    """Continues its text after the part with which the prompt ends, and stops at the end of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text = text
        self.models = {"data": [{"id": "big"}]}
        self.answers = [self._recite]
        self.asked: list[dict[str, Any]] = []
        """Bodies of the requests to ``/tokenize``."""
        self.prompts: list[str] = []
        """Prompts that it was asked to continue, with their special tokens."""
        self.written: list[list[int]] = []
        """Token ids of each answer."""
        self.ends = True
        """Whether the completion ends with the text; if not, the teacher has more to write."""

    def after(self, prompt: str) -> str:
        """The rest of the text after the part that ends the prompt; the whole text if there is none."""
        written = prompt.rsplit(f"{START}assistant\n", 1)[-1]
        return self.text.removeprefix(written)

    async def _tokenize(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.asked.append(asked)
        if "messages" in asked:
            text = self.tokenizer.apply_chat_template(
                asked["messages"],
                tokenize=False,
                add_generation_prompt=asked.get("add_generation_prompt", True),
            )
        else:
            text = asked["prompt"]
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        answer = {"count": len(ids), "tokens": ids}
        if asked.get("return_token_strs"):
            answer["token_strs"] = self.tokenizer.convert_ids_to_tokens(ids)
        return web.json_response(answer)

    async def _recite(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        prompt = self.tokenizer.decode(asked["prompt"])
        self.prompts.append(prompt)
        ids = self.tokenizer.encode(self.after(prompt), add_special_tokens=False)
        if self.ends:
            ids.append(self.tokenizer.eos_token_id)
        while asked.get("ignore_eos") and len(ids) < asked["max_tokens"]:
            ids += [*self.tokenizer.encode(self.text, add_special_tokens=False), self.tokenizer.eos_token_id]
        ids = ids[: asked["max_tokens"]]
        sent: list[int] = []
        self.written.append(sent)
        response = await begin_events(request)
        shown = ""
        for token_id in ids:
            sent.append(token_id)
            text = self.tokenizer.decode(sent, skip_special_tokens=True)
            if text.endswith("\ufffd"):
                text = shown
            last = len(sent) == len(ids)
            end = token_id == self.tokenizer.eos_token_id and not asked.get("ignore_eos")
            finish = "stop" if end else "length" if last else None
            await response.write(event(choice([token_id], finish, text=text[len(shown) :])))
            shown = text
        await response.write(event("[DONE]"))
        return response
