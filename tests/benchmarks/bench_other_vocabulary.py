"""Checks a real teacher with another vocabulary in real engines: its own text, hard bounds, whole characters.

Two students: the demo's, which has no tokens for most characters, and a random one with tokens for all
bytes. The teacher is asked to repeat texts with emoji, CJK and combining characters. Every token is checked.

    python -m tests.benchmarks.bench_other_vocabulary --teacher DIRECTORY
"""

import argparse
import asyncio
import itertools
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from measuring.pair import HOST, START_SECONDS, Pair, free_port, gateway_service, teacher_service
from measuring.processes import running
from tests.helpers.client import PATIENCE, UNHURRIED, chat, excess
from tests.helpers.paths import DEMO
from tests.helpers.tiny_models import save_teacher_of_other_words

UNKNOWN = "\ufffd"
SPAN_TOKENS = 16
ALONE = (
    "Name three colours.",
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "Count to ten.",
)
PHRASES = (
    "I like tea 🙂🎉",
    "你好,世界!",
    "cafe\u0301 and nai\u0308ve",
    "नमस्ते दुनिया",
    "한국어 문장입니다",
    "👩‍👩‍👧 family 👍🏽",
    "こんにちは、元気ですか",
    "Z\u0334\u0310a\u0335\u0301l\u0336go",
    "plain words only",
    "Ελληνικά και русский",
)
ASKS = (
    "Repeat exactly: {}",
    "Say this twice: {}",
    "Translate to English: {}",
    "Write a short poem with: {}",
    "{}",
)


class Checked(NamedTuple):
    """The result of checking one reply."""

    tokens: int
    completion: int
    excess: float
    broken: int
    """Number of the teacher's spans that begin or end within a character where the completion goes on."""
    unknown: bool
    """Whether the client's text has a replacement character that the student alone did not write."""
    foreign: int
    """Number of characters in the teacher's spans that are not ASCII."""
    marks: int
    """Number of combining characters among them."""
    denied: Counter[str]
    degraded: bool


def client_of(url: str) -> AsyncOpenAI:
    """The official client, without a bound on connections."""
    http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=PATIENCE)
    return AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE, http_client=http
    )


def checked(reply: Any, tokenizer: Any, fraction: float) -> Checked:
    """Check every span of a reply."""
    ids = reply.choices[0].token_ids
    report = reply.teacher
    broken = 0
    text = ""
    alone = 0
    here = 0
    for start, end in report["spans"]:
        span = tokenizer.decode(ids[start:end])
        alone += tokenizer.decode(ids[here:start]).count(UNKNOWN)
        here = end
        text += span
        cut_off = end == len(ids) and reply.choices[0].finish_reason == "length"
        broken += UNKNOWN in (span.rstrip(UNKNOWN) if cut_off else span)
    foreign = [character for character in text if not character.isascii()]
    return Checked(
        report["tokens"],
        len(ids),
        excess(reply, fraction, SPAN_TOKENS),
        broken,
        (reply.choices[0].message.content or "").count(UNKNOWN)
        > alone + tokenizer.decode(ids[here:]).count(UNKNOWN),
        len(foreign),
        sum(unicodedata.combining(character) > 0 for character in foreign),
        Counter(report["denied"]),
        report["degraded"],
    )


async def own_text(gateway: str, teacher: str, prompts: list[str], length: int) -> None:
    """Compare completions at budget 1 with those of the teacher alone."""
    async with client_of(gateway) as ours, client_of(teacher) as theirs:
        same = 0
        for prompt in prompts:
            alone = await theirs.chat.completions.create(
                model="teacher",
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=length,
            )
            expected = alone.choices[0].message.content
            reply = await chat(ours, prompt, 1, max_tokens=length)
            text = reply.choices[0].message.content
            ended = reply.choices[0].finish_reason == "stop"
            if text == expected or (not ended and expected.startswith(text)):
                same += 1
            else:
                print(f"  budget 1 differs: {prompt!r}: {text!r}, alone {expected!r}, {reply.teacher}")
    print(f"budget 1: the teacher's own text in {same} of {len(prompts)}", flush=True)


async def bounds(gateway: str, student: Path, requests: int, fraction: float, length: int) -> None:
    """Send all requests at once and check their bounds and characters."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    pairs = itertools.islice(itertools.cycle(itertools.product(ASKS, PHRASES)), requests)
    prompts = [f"{ask.format(phrase)} ({number})" for number, (ask, phrase) in enumerate(pairs)]
    async with client_of(gateway) as ours:
        start = time.perf_counter()
        replies = await asyncio.gather(
            *(chat(ours, prompt, fraction, max_tokens=length) for prompt in prompts)
        )
        seconds = time.perf_counter() - start
    each = [checked(reply, tokenizer, fraction) for reply in replies]
    tokens = sum(one.tokens for one in each)
    completion = sum(one.completion for one in each)
    denied = sum((one.denied for one in each), Counter[str]())
    facts = {
        "above the bound": sum(one.excess > 1e-9 for one in each),
        "spans with a broken character": sum(one.broken for one in each),
        "texts with U+FFFD that is not the student's": sum(one.unknown for one in each),
        "the teacher's characters beyond ASCII": sum(one.foreign for one in each),
        "combining": sum(one.marks for one in each),
        "degraded": sum(one.degraded for one in each),
        "denied": dict(denied),
    }
    print(
        f"budget {fraction:g}: {len(each)} at once in {seconds:.0f} s, {tokens} of {completion} tokens "
        f"({tokens / completion:.1%}); {', '.join(f'{name}: {value}' for name, value in facts.items())}",
        flush=True,
    )


def measure(student: Path, teacher: Path, logs: Path, options: argparse.Namespace, *, whole: bool) -> None:
    """Measure one student; ``whole``: whether it has tokens for every character."""
    pair = Pair(teacher=teacher, student=student, router=None)
    their_url, our_url = f"http://{HOST}:{free_port()}", f"http://{HOST}:{free_port()}"
    theirs = ("--max-model-len", "512", "--kv-cache-memory-bytes", "1G")
    ours = (*UNHURRIED, "--span-tokens", str(SPAN_TOKENS), "--ask-tokens", "8", "--gate", "random")
    services = [teacher_service(teacher, their_url, logs, flags=theirs)]
    services.append(gateway_service(pair, their_url, our_url, logs, ours))
    prompts = [*ALONE, *(ASKS[0].format(phrase) for phrase in PHRASES if whole)]
    with running(services, timeout=2 * START_SECONDS):
        asyncio.run(own_text(our_url, their_url, prompts, options.length))
        asyncio.run(bounds(our_url, student, options.requests, 0.2, options.length))


def main() -> None:
    """Print two lines for each student."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="directory of a chat model")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--length", type=int, default=60, help="most tokens of a completion")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        print("the demo's student", flush=True)
        measure(DEMO / "student", options.teacher, directory, options, whole=False)
        print("a student with tokens for all bytes", flush=True)
        everything = save_teacher_of_other_words(directory / "student")
        measure(everything, options.teacher, directory, options, whole=True)


if __name__ == "__main__":
    main()
