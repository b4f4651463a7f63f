"""Grammars for the shipped student: vLLM's configuration, and requests after vLLM's own check."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm.sampling_params import StructuredOutputsParams

from server.vllm_api import AsyncEngineArgs, EngineRequest, SamplingParams
from tests.helpers.paths import DEMO

STUDENT = DEMO / "student"
PROMPT_IDS = [5, 6, 7]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ANN = '{"name": "Ann", "age": 42}'


def engine_config(model: Path = STUDENT, **settings: Any) -> Any:
    """vLLM's configuration of a student's engine."""
    return AsyncEngineArgs(model=str(model), **settings).create_engine_config()


@cache
def tokenizer_of(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


def checked(config: Any, *, backend: str = "auto", extra_args: Any = None, **grammar: Any) -> SamplingParams:
    """The parameters of a request with this grammar, after vLLM's own check."""
    params = SamplingParams(
        max_tokens=64, extra_args=extra_args, structured_outputs=StructuredOutputsParams(**grammar)
    )
    tokenizer = tokenizer_of(Path(config.model_config.model))
    settings = config.structured_outputs_config
    settings.backend = backend
    params.verify(config.model_config, None, settings, tokenizer)
    params.update_from_generation_config({}, tokenizer.eos_token_id)
    return params


def segment(params: SamplingParams, written: list[int] | None = None, **given: Any) -> EngineRequest:
    """A request to the student's engine that continues the tokens written so far."""
    return EngineRequest("r-0", [*PROMPT_IDS, *(written or ())], params, None, **given)


def ids(text: str, model: Path = STUDENT) -> list[int]:
    found: list[int] = tokenizer_of(model).encode(text, add_special_tokens=False)
    return found


def person() -> dict[str, Any]:
    """A copy of the schema, as clients send it."""
    return json.loads(json.dumps(PERSON))
