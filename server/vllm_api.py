"""Every name of vLLM that the gateway uses, so that an upgrade of vLLM touches this file.

Public names first, then vLLM's HTTP server, then what vLLM does not offer: each of its private names is
reached through one function here, which `tests/unit/test_vllm_contract.py` checks against vLLM itself.
"""

import os
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import cache
from typing import Any, NoReturn

from vllm import SamplingParams, envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.usage.usage_lib import UsageContext
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

from server.config import ConfigError
from server.vllm_arguments import check_arguments, check_fixed, one_line
from server.vllm_flags import write_flags

KEEP_ALIVE_VARIABLE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"


class HttpLayer:
    """vLLM's OpenAI server around any engine; imported late, as the engine's process needs none of it."""

    def __init__(self) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.launcher import serve_http, setup_server

        self.init_app_state = init_app_state
        self.build_app = build_app
        self.serve_http = serve_http
        self._setup_server = setup_server

    def parse(self, settings: Mapping[str, Any], fixed: Mapping[str, Any] | None = None) -> Namespace:
        """Settings by flag name as vLLM's server arguments, with ``fixed`` ones that nobody may change.

        Raises:
            ConfigError: a setting is unknown, wrong, fixed, or nothing that a gateway can honour.
        """
        from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

        parser = _parser()
        actions = parser._option_string_actions
        fixed = fixed or {}
        check_fixed(settings, fixed, actions)
        try:
            arguments = parser.parse_args(write_flags({**settings, **fixed}, actions))
            validate_parsed_serve_args(arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"vllm: {one_line(error)}") from error
        check_arguments(arguments)
        return arguments

    def prepare(self, arguments: Namespace) -> None:
        """Set up logging and the start of processes, as vLLM's own entry does before it starts an engine.

        Raises:
            ConfigError: the logging configuration is not usable.
        """
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.logger import configure_logging_from_args

        cli_env_setup()
        try:
            configure_logging_from_args(arguments)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"vllm's logging-config: {one_line(error)}") from error

    def listen(self, arguments: Namespace) -> tuple[str, socket.socket]:
        """The address for the operator, and its socket.

        Raises:
            ConfigError: it cannot be listened on, or a parser of tools or reasoning is unknown.
        """
        try:
            address, listening = self._setup_server(arguments, reuse_port=False)
        except (ImportError, KeyError, OSError) as error:
            raise ConfigError(f"vllm: {one_line(error)}") from error
        if arguments.ssl_certfile is not None:  # a key of its own is no condition
            address = address.replace("http://", "https://", 1)
        return address, listening

    def serve_options(self, arguments: Namespace, *, keep_alive_seconds: int) -> dict[str, Any]:
        """What vLLM's own entry passes to `serve_http` besides app and socket."""
        from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

        log_config = get_uvicorn_log_config(arguments)
        return {
            "enable_ssl_refresh": arguments.enable_ssl_refresh,
            "host": arguments.host,
            "port": arguments.port,
            "log_level": arguments.uvicorn_log_level,
            "access_log": not arguments.disable_uvicorn_access_log,
            "timeout_keep_alive": int(os.environ.get(KEEP_ALIVE_VARIABLE, keep_alive_seconds)),
            "ssl_keyfile": arguments.ssl_keyfile,
            "ssl_certfile": arguments.ssl_certfile,
            "ssl_ca_certs": arguments.ssl_ca_certs,
            "ssl_cert_reqs": arguments.ssl_cert_reqs,
            "ssl_ciphers": arguments.ssl_ciphers,
            "h11_max_incomplete_event_size": arguments.h11_max_incomplete_event_size,
            "h11_max_header_count": arguments.h11_max_header_count,
            **({} if log_config is None else {"log_config": log_config}),
        }


@cache
def _parser() -> ArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"vllm: {one_line(message)}")

    # Without abbreviations: a setting that the gateway makes itself has no second name.
    return make_arg_parser(Parser(prog="wheels serve --", allow_abbrev=False))


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
    "UsageContext",
    "VLLMValidationError",
    "convert_ids_list_to_tokens",
    "current_platform",
    "data_parallel_ranks",
    "error_info",
    "max_bad_words_tokens",
    "merge_async_iterators",
    "parses_streams",
]
