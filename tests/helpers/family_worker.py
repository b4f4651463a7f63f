"""Lets the models of `families` write, one after the other in this process; prints a line of JSON for each.

Every model is loaded twice: in stock vLLM as it is, and in vLLM as the gateway's copy with a router. The
first is the teacher, the second the student. So the completion has to be the same, whoever writes.

The models and the logits that the gate saw stay in the directory: another process compares them with those of
transformers, because vLLM changes classes of transformers that it runs itself.
"""

import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",  # a model is tiny, and another process has the other core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.models import ModelRegistry

from measuring.pair import UNIPROC
from router.gate import Gate
from router.reserved import ReservedRows
from server.gate_processor import PRICE, PROCESSORS, gate_settings
from tests.helpers.families import APPENDED, LOGITS, MERGED, ORIGINAL, ROWS, router_for, write

TOKENS = 12
SPAN_TOKENS = 2
DRAWN = random.Random(0)
PROMPTS = [[DRAWN.randrange(2, ROWS) for _ in range(DRAWN.randrange(2, 9))] for _ in range(6)]
Completions = list[list[int]]


class ScriptedGate(Gate):
    """A gate that scores by a rule and keeps the logits that it was given."""

    def __init__(self, reserved: ReservedRows, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__(reserved)
        self.rule = rule
        self.seen: list[Tensor] = []

    def forward(self, logits: Tensor) -> Tensor:
        self.seen.append(logits.clone())
        return self.rule(logits)


def never(logits: Tensor) -> Tensor:
    return torch.full((len(logits),), -torch.inf)


def always(logits: Tensor) -> Tensor:
    return torch.ones(len(logits))


def in_turns() -> Callable[[Tensor], Tensor]:
    """A rule that asks in every third row, and in other rows at each step, so no model decides the share."""
    steps = itertools.count()

    def rule(logits: Tensor) -> Tensor:
        return ((torch.arange(len(logits)) + next(steps)) % 3 == 0).float()

    return rule


def engine(model: Path, **settings: Any) -> LLM:
    return LLM(
        model=str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=len(PROMPTS),
        block_size=32,
        kv_cache_memory_bytes=2**25,
        distributed_executor_backend=UNIPROC,
        **settings,
    )


@dataclass(frozen=True)
class Request:
    """A continuation to write after some ids."""

    ids: list[int]
    tokens: int
    """Largest number of tokens to write."""


def written(llm: LLM, requests: list[Request], **settings: Any) -> Completions:
    params = []
    for request in requests:
        params.append(
            SamplingParams(
                temperature=0, max_tokens=request.tokens, ignore_eos=True, detokenize=False, **settings
            )
        )
    prompts = [{"prompt_token_ids": request.ids} for request in requests]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def alone(llm: LLM, **settings: Any) -> Completions:
    return written(llm, [Request(ids, TOKENS) for ids in PROMPTS], **settings)


@dataclass
class Cooperative:
    """Completions that two engines wrote together."""

    completions: Completions
    teacher_tokens: int


def together(student: LLM, teacher: LLM) -> Cooperative:
    """Let both engines write in turns, each after the whole prefix so far, as in the span loop."""
    done: Completions = [[] for _ in PROMPTS]
    teacher_tokens = 0
    while waiting := [index for index, tokens in enumerate(done) if len(tokens) < TOKENS]:
        segments = written(
            student, _rest(done, waiting), extra_args={PRICE: 0.0}, stop_token_ids=[APPENDED.escalation]
        )
        asking = []
        for index, segment in zip(waiting, segments, strict=True):
            if segment[-1] == APPENDED.escalation:
                asking.append(index)
                segment.pop()
            done[index] += segment
        asking = [index for index in asking if len(done[index]) < TOKENS]
        spans = written(teacher, _rest(done, asking, SPAN_TOKENS)) if asking else []
        for index, span in zip(asking, spans, strict=True):
            done[index] += span
            teacher_tokens += len(span)
    return Cooperative(done, teacher_tokens)


def _rest(done: Completions, indices: list[int], most: int = TOKENS) -> list[Request]:
    requests = []
    for index in indices:
        left = TOKENS - len(done[index])
        requests.append(Request(PROMPTS[index] + done[index], min(left, most)))
    return requests


def register(model: Path) -> None:
    """Register the model's class. Otherwise vLLM inspects it in another process, which takes seconds."""
    (name,) = json.loads((model / "config.json").read_text())["architectures"]
    known = ModelRegistry.models[name]
    if getattr(known, "module_name", None) is None:  # registered for an earlier family
        return
    with set_current_vllm_config(VllmConfig()):
        ModelRegistry.register_model(name, known.load_model_cls())


def compared(family: str, directory: Path) -> dict[str, Any]:
    original = write(family, directory / ORIGINAL)
    merged = directory / MERGED
    router_for(original).merge(original, merged)
    register(original)
    teacher = engine(original)
    # This gate is replaced below. Gates that read logits load numba. After that vLLM cannot start another
    # engine in this process: it calls vars() on the objects of all modules, which fails in llvmlite.
    settings = gate_settings(APPENDED, "random", None, ROWS)
    student = engine(
        merged, logits_processors=["server.gate_processor:GateProcessor"], additional_config=settings
    )
    (processor,) = PROCESSORS
    processor.gate = gate = ScriptedGate(APPENDED, never)
    result: dict[str, Any] = {"prompts": PROMPTS, "stock": alone(teacher)}
    result["alone"] = alone(student, extra_args={PRICE: 0.0})
    save_file({"seen": torch.stack(gate.seen, dim=1)}, directory / LOGITS)
    for name, rule in (("mixed", in_turns()), ("whole", always)):
        gate.rule = rule
        result[name] = asdict(together(student, teacher))
    return result


def main(directory: str, families: list[str]) -> None:
    for number, family in enumerate(families):
        start = time.process_time()
        place = Path(directory) / str(number)
        try:
            result = compared(family, place)
        except Exception as error:  # go on: the next family may work
            result = {"failed": f"{type(error).__name__}: {error}"}
        gc.collect()
        result |= {"family": family, "place": str(place), "cpu_seconds": time.process_time() - start}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
