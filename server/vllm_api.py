"""Every name of vLLM that the gateway uses, so that an upgrade of vLLM touches this file."""

from argparse import Namespace
from typing import Any

from vllm import SamplingParams, envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.logit_bias import (
    MAX_NUM_ALLOWED_TOKEN_IDS,
    MAX_NUM_LOGIT_BIAS_TOKENS,
    MAX_NUM_STOP_TOKEN_IDS,
)
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2


class HttpLayer:
    """vLLM's OpenAI server around any engine; imported late, as the engine's process needs none of it."""

    def __init__(self) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.launcher import serve_http, setup_server

        self.init_app_state = init_app_state
        self.build_app = build_app
        self.serve_http = serve_http
        self.setup_server = setup_server

    def parse(self, settings: dict[str, Any]) -> Namespace:
        """Settings by flag name as vLLM's server arguments; a wrong one ends the process, as in vLLM."""
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        flags: list[str] = []
        for name, value in settings.items():
            if value is not False:
                values = value if isinstance(value, list) else [value]
                flags += [f"--{name}", *(str(v) for v in values if v is not True)]
        arguments = make_arg_parser(FlexibleArgumentParser(prog="wheels serve --")).parse_args(flags)
        validate_parsed_serve_args(arguments)
        return arguments


def max_bad_words_tokens() -> int:
    """The most tokens that the V2 model runner takes of all bad words of a request."""
    return int(envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS)


def data_parallel_ranks(parallel: Any) -> int:
    """How many ranks a request may be sent to, by vLLM's ``ParallelConfig``."""
    if parallel.local_engines_only:
        return int(parallel.data_parallel_size_local)
    return int(parallel.data_parallel_size)


def parses_streams(arguments: Namespace) -> bool:
    """Whether vLLM's HTTP layer reads reasoning or tool calls out of what is streamed."""
    structured = arguments.structured_outputs_config.reasoning_parser
    return bool(arguments.tool_call_parser or arguments.reasoning_parser or structured)


def error_info(error: Exception) -> Any:
    """What vLLM's server answers after an exception: its `message`, `type`, `code` and `param`."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    return create_error_response(error).error


__all__ = [
    "MAX_NUM_ALLOWED_TOKEN_IDS",
    "MAX_NUM_LOGIT_BIAS_TOKENS",
    "MAX_NUM_STOP_TOKEN_IDS",
    "AsyncEngineArgs",
    "AsyncLLM",
    "CompletionOutput",
    "EngineCoreRequest",
    "GracefulHTTPError",
    "HttpLayer",
    "IncrementalDetokenizer",
    "LogitsProcessor",
    "LogitsProcessorV2",
    "Logprob",
    "LogprobsProcessor",
    "MoveDirectionality",
    "RequestOutput",
    "RequestOutputKind",
    "Sampler",
    "SamplingParams",
    "VLLMValidationError",
    "convert_ids_list_to_tokens",
    "current_platform",
    "data_parallel_ranks",
    "error_info",
    "max_bad_words_tokens",
    "merge_async_iterators",
    "parses_streams",
]
