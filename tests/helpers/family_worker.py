"""Writes with the models of `families`, one after the other in this process; a line of JSON for each.

Every model writes twice: in stock vLLM as it is, and in vLLM as the gateway's copy with a router. The second
one's gate never asks, and keeps the logits that it was given.
"""

import gc
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.model_executor.models import ModelRegistry

from router.checkpoint import MERGED_ROUTER
from router.gate import Gate
from router.reserved import ReservedRows
from server.gate_processor import PRICE, PROCESSORS, gate_settings
from server.local.pair import UNIPROC
from tests.helpers.families import APPENDED, ROWS, load, router_for, write

TOKENS = 12
DRAWN = random.Random(0)
PROMPTS = [[DRAWN.randrange(2, ROWS) for _ in range(DRAWN.randrange(2, 9))] for _ in range(6)]


class Recorder(Gate):
    """A gate that never asks."""

    def __init__(self, reserved: ReservedRows) -> None:
        super().__init__(reserved)
        self.seen: list[Tensor] = []

    def forward(self, logits: Tensor) -> Tensor:
        self.seen.append(logits.clone())
        return torch.full((len(logits),), -torch.inf)


def engine(model: Path, **settings: Any) -> LLM:
    return LLM(
        model=str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=len(PROMPTS),
        block_size=32,
        distributed_executor_backend=UNIPROC,
        **settings,
    )


def written(llm: LLM, **settings: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, **settings)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def stock(model: Path) -> list[list[int]]:
    return written(engine(model))


def gated(model: Path) -> tuple[list[list[int]], Tensor]:
    """What it writes, and the logits (prompts, TOKENS, V) that its gate saw."""
    settings = gate_settings(APPENDED, "learned", model / MERGED_ROUTER, ROWS)
    llm = engine(model, logits_processors=["server.gate_processor:GateProcessor"], additional_config=settings)
    (processor,) = PROCESSORS
    processor.gate = recorder = Recorder(APPENDED)
    tokens = written(llm, extra_args={PRICE: 0.0})
    return tokens, torch.stack(recorder.seen, dim=1)


def logits_of(family: str, model: Path, completions: list[list[int]]) -> Tensor:
    """The same logits as transformers computes them."""
    reference, rows = load(family, model), []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        logits = reference(torch.tensor([prompt + completion])).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.stack(rows)


def register(model: Path) -> None:
    """Its class, which vLLM otherwise looks at in a process of its own, for seconds."""
    (name,) = json.loads((model / "config.json").read_text())["architectures"]
    known = ModelRegistry.models[name]
    module = getattr(known, "module_name", None)
    if module is None:  # registered for an earlier family
        return
    if not module.endswith(".transformers"):  # that module needs an engine to be imported
        ModelRegistry.register_model(name, known.load_model_cls())


def compared(family: str, directory: Path) -> dict[str, Any]:
    original, merged = write(family, directory / "original"), directory / "merged"
    router_for(original).merge(original, merged)
    register(original)
    alone = stock(original)
    gc.collect()
    ours, seen = gated(merged)
    expected = logits_of(family, merged, ours)
    error = (seen - expected).abs().amax() / expected.abs().amax()
    return {"stock": alone, "ours": ours, "error": error.item()}


def main(families: list[str]) -> None:
    for family in families:
        with tempfile.TemporaryDirectory() as directory:
            try:
                result = compared(family, Path(directory))
            except Exception as error:  # the next family may work
                result = {"failed": f"{type(error).__name__}: {error}"}
        gc.collect()
        print(json.dumps({"family": family} | result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
