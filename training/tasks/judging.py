"""Lets a served model judge answers."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from openai import OpenAI, OpenAIError

from measuring.chats import Source, messages_of
from router.address import base_url
from router.errors import PeerError

QUESTION = (
    "Rate how well the answer below serves the conversation, from 0 (useless) to 10 (could not be better). "
    "Reply with the number alone."
)
AT_ONCE = 16
"""Number of concurrent requests to the judge."""
SHOWN = 60
"""Number of characters of a judge's reply that a message shows."""


class JudgeError(PeerError):
    """The judge is unreachable, or does not reply with a number; the message names its URL."""


@dataclass(frozen=True)
class ServedJudge:
    """A judge behind an OpenAI-style URL, which rates each answer from 0 to 10."""

    url: str
    """Base URL of the server, with or without /v1."""
    model: str | None = None
    """The model's name at the server; None: the first model there."""
    question: str = QUESTION
    """Instruction to the judge, before conversation and answer."""
    api_key: str = "none"

    def rate(self, sources: Sequence[Source], answers: Sequence[str]) -> list[float]:
        """A rating in [0, 1] of each answer.

        Raises:
            JudgeError: the judge cannot be reached, or a reply is not a rating.
        """
        with OpenAI(base_url=f"{base_url(self.url)}/v1", api_key=self.api_key) as client:
            try:
                model = self.model or client.models.list().data[0].id
                rated = partial(self._rated, client, model)
                with ThreadPoolExecutor(AT_ONCE) as threads:
                    return list(threads.map(rated, sources, answers))
            except (OpenAIError, IndexError) as error:
                raise JudgeError(f"the judge at {self.url}: {error}") from error

    def _rated(self, client: OpenAI, model: str, source: Source, answer: str) -> float:
        lines = [f"{message['role']}: {message['content']}" for message in messages_of(source)]
        text = "\n\n".join([self.question, "Conversation:", *lines, "Answer:", answer])
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=16
        )
        content = reply.choices[0].message.content or ""
        found = re.search(r"\d+(\.\d+)?", content)
        if found is None or float(found[0]) > 10:
            problem = f"it replied {content[:SHOWN]!r}, not a number from 0 to 10"
            raise JudgeError(f"the judge at {self.url}: {problem}")
        return float(found[0]) / 10
