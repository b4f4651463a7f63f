"""Every name of vLLM that the gateway uses, so that an upgrade of vLLM touches this file.

vLLM's public names come first, then its HTTP server, then its private names. Each private name is reached
through one function here, which `tests/unit/server/test_vllm_contract.py` checks against vLLM itself.
"""

import inspect
import math
import os
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, reduce, wraps
from importlib import import_module
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor
from vllm import SamplingParams, envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logprobs import Logprob
from vllm.model_executor.layers.logits_processor import LogitsProcessor as LogitsComputation
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.tokenizers import TokenizerLike
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.usage.usage_lib import UsageContext
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.core.sched.utils import check_sequence_repetition
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.request import Request as EngineRequest
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.sample.sampler import Sampler
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.sample.logit_bias import (
    MAX_NUM_ALLOWED_TOKEN_IDS,
    MAX_NUM_LOGIT_BIAS_TOKENS,
    MAX_NUM_STOP_TOKEN_IDS,
)
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from server.config import ConfigError
from server.original_prompt import OriginalPrompt, begun_with
from server.vllm_arguments import check_arguments, check_fixed, one_line
from server.vllm_flags import write_flags

KEEP_ALIVE_VARIABLE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"


class Listening(NamedTuple):
    """The address of a server."""

    address: str
    """Address as shown to the operator."""
    socket: socket.socket


class HttpLayer:
    """vLLM's OpenAI server around any engine; imported late, as the engine's process does not need it."""

    def __init__(self) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.launcher import serve_http, setup_server

        self.init_app_state = init_app_state
        self.build_app = build_app
        self.serve_http = serve_http
        self._setup_server = setup_server

    def parse(self, settings: Mapping[str, Any], fixed: Mapping[str, Any] | None = None) -> Namespace:
        """Server arguments of vLLM from settings by flag name.

        Args:
            settings: the operator's settings.
            fixed: the gateway's own settings, which the operator may not set.

        Raises:
            ConfigError: a setting is unknown, wrong, fixed, or not supported by a gateway.
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
        """Set up logging and the start of processes, as vLLM's own entry point does before its engine.

        Raises:
            ConfigError: the logging configuration is not usable.
        """
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.logger import configure_logging_from_args

        cli_env_setup()  # type: ignore[no-untyped-call]
        try:
            configure_logging_from_args(arguments)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"vllm's logging-config: {one_line(error)}") from error

    def listen(self, arguments: Namespace) -> Listening:
        """Bind the server's socket; returns it with the address.

        Raises:
            ConfigError: the address cannot be used, or a parser of tools or reasoning is unknown.
        """
        try:
            address, listening = self._setup_server(arguments, reuse_port=False)
        except (ImportError, KeyError, OSError) as error:
            raise ConfigError(f"vllm: {one_line(error)}") from error
        if arguments.ssl_certfile is not None:  # the key may be in the same file
            address = address.replace("http://", "https://", 1)
        return Listening(address, listening)

    def serve_options(self, arguments: Namespace, *, keep_alive_seconds: int) -> dict[str, Any]:
        """The options that vLLM's own entry point passes to `serve_http`, without app and socket."""
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
    parser = Parser(prog="wheels serve --", allow_abbrev=False)  # type: ignore[no-untyped-call]
    return make_arg_parser(parser)


def max_bad_words_tokens() -> int:
    """Most tokens that all bad words of a request may have together in the V2 model runner."""
    return int(envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS)


def data_parallel_ranks(parallel: Any) -> int:
    """Number of ranks that a request may be sent to, by vLLM's ``ParallelConfig``."""
    if parallel.local_engines_only:
        return int(parallel.data_parallel_size_local)
    return int(parallel.data_parallel_size)


class ReasoningMarkers(NamedTuple):
    """Token ids by which vLLM finds the beginning and the end of thinking."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    """End marker in the reasoning parser."""
    forced: tuple[int, ...]
    """Tokens that vLLM writes when a thinking budget is used up; the last of them are ``end``."""

    @property
    def longest(self) -> int:
        """Number of tokens of the longer marker."""
        return max(len(self.start), len(self.end))


def reasoning_markers(vllm_config: Any) -> ReasoningMarkers | None:
    """The markers of a vLLM configuration; None if it has none, and takes no `thinking_token_budget`."""
    reasoning = vllm_config.reasoning_config
    if reasoning is None or not reasoning.enabled:
        return None
    return ReasoningMarkers(
        start=tuple(reasoning.reasoning_start_token_ids),
        end=tuple(reasoning.natural_reasoning_end_token_ids),
        forced=tuple(reasoning.reasoning_end_token_ids),
    )


def repeats(token_ids: Sequence[int], params: SamplingParams) -> bool:
    """Whether the last tokens are a repetition that ``params`` ask to detect."""
    detection = params.repetition_detection
    return detection is not None and check_sequence_repetition(token_ids, detection)


class UnsupportedVllm(ConfigError):
    """This vLLM lacks a private name that the gateway uses; the message is one line for the operator."""


# Functions by which each model runner of vLLM computes the scores that it reports. None of them has a hook.
# All see the logits before any processor does. A module that imports a function has its own name for it.
REPORTS_V1 = (
    ("vllm.v1.sample.sampler", "Sampler.compute_logprobs"),
    ("vllm.v1.sample.sampler", "Sampler.gather_logprobs"),
)
REPORTS_V2 = (
    ("vllm.v1.worker.gpu.sample.logprob", "compute_token_logprobs"),
    ("vllm.v1.worker.gpu.sample.logprob", "compute_topk_scores"),
    ("vllm.v1.worker.gpu.sample.sampler", "compute_topk_scores"),
    ("vllm.v1.worker.gpu.sample.prompt_logprob", "compute_token_logprobs"),
    ("vllm.v1.worker.gpu.sample.prompt_logprob", "compute_topk_scores"),
    ("vllm.v1.worker.gpu.spec_decode.rejection_sampler", "compute_topk_scores"),
)


# Functions by which each model runner of vLLM looks at a request's own tokens. The last name is the argument
# that separates these tokens from the prompt.
COUNTS_V1 = (
    ("vllm.v1.sample.sampler", "apply_all_penalties", "output_token_ids"),
    ("vllm.v1.sample.sampler", "apply_bad_words", "past_tokens_ids"),
)
COUNTS_V2 = (
    ("vllm.v1.worker.gpu.sample.penalties", "bincount", "prompt_len"),
    ("vllm.v1.worker.gpu.sample.bad_words", "apply_bad_words", "prompt_len"),
)


class VllmFunction(NamedTuple):
    """A function of vLLM, with the owner and the name by which vLLM looks it up."""

    owner: Any
    name: str
    function: Callable[..., Any]


def _find(module: str, path: str) -> VllmFunction:
    """The function at this path of a module. Raises UnsupportedVllm if it is gone."""
    try:
        *owners, name = path.split(".")
        owner = reduce(getattr, owners, import_module(module))
        return VllmFunction(owner, name, getattr(owner, name))
    except (ImportError, AttributeError) as error:
        raise UnsupportedVllm(f"this version of vLLM is not supported: it has no {module}.{path}") from error


def find_reports(*, v2: bool) -> list[VllmFunction]:
    """The functions of a model runner that compute reported scores; their first argument is logits (..., V).

    Raises UnsupportedVllm if one is gone.
    """
    return [_find(module, path) for module, path in (REPORTS_V2 if v2 else REPORTS_V1)]


def find_counts(*, v2: bool) -> list[VllmFunction]:
    """The functions of a runner that read a request's own tokens. Raises UnsupportedVllm if one is gone."""
    return [_find(module, path) for module, path, _ in (COUNTS_V2 if v2 else COUNTS_V1)]


def count_from(change: Callable[[Any], Any], *, v2: bool) -> None:
    """Have vLLM count a request's own tokens from another token on.

    Args:
        change: for V1, turns the output ids of every row into the ids to count. For V2, turns the prompt
            length of every slot into the number of tokens after which the count starts.
        v2: whether the V2 model runner is used, else V1.

    Raises:
        UnsupportedVllm: a function or its argument is gone.
    """
    for module, path, argument in COUNTS_V2 if v2 else COUNTS_V1:
        owner, name, function = _find(module, path)
        original = getattr(function, "original", function)
        signature = inspect.signature(original)
        if argument not in signature.parameters:
            raise UnsupportedVllm(
                f"this version of vLLM is not supported: its {module}.{path} takes no {argument}"
            )
        setattr(owner, name, _counting(original, signature, argument, change))


def _counting(
    original: Callable[..., Any], signature: inspect.Signature, argument: str, change: Callable[[Any], Any]
) -> Callable[..., Any]:
    @wraps(original)
    def counting(*args: Any, **options: Any) -> Any:
        call = signature.bind(*args, **options)
        call.arguments[argument] = change(call.arguments[argument])
        return original(*call.args, **call.kwargs)

    vars(counting).update(original=original)
    return counting


def hide_from_reports(rows: slice, *, v2: bool) -> None:
    """Keep these rows of the vocabulary out of the log-probabilities that vLLM reports, and of its top k."""
    for owner, name, function in find_reports(v2=v2):
        if getattr(function, "rows", None) == rows:
            continue
        original = getattr(function, "original", function)
        wrapped = _hiding(original, rows)
        setattr(owner, name, staticmethod(wrapped) if isinstance(owner, type) else wrapped)


def _hiding(original: Callable[..., Any], rows: slice) -> Callable[..., Any]:
    @wraps(original)
    def hiding(logits: Tensor, *args: Any, **options: Any) -> Any:
        hidden = logits[..., rows].clone()  # restored below: a copy of all logits would be large
        logits[..., rows] = -math.inf
        try:
            return original(logits, *args, **options)
        finally:
            logits[..., rows] = hidden

    vars(hiding).update(original=original, rows=rows)
    return hiding


def keep_from_adapters(rows: slice) -> None:
    """Have LoRA adapters leave these rows of the vocabulary unchanged, because they are the router's.

    If the rows were appended, an adapter of the original model does not have them.
    """
    # Imported here, because only the engine's process needs them, and they take a second.
    from vllm.lora.layers import LogitsProcessorWithLoRA
    from vllm.lora.lora_model import LoRAModel

    scores: Any = LogitsProcessorWithLoRA
    adapter: Any = LoRAModel
    set_output = getattr(scores.set_lora, "original", scores.set_lora)
    make = getattr(adapter.from_lora_tensors, "original", adapter.from_lora_tensors.__func__)

    @wraps(set_output)
    def set_lora(self: Any, index: int, *args: Any, **options: Any) -> None:
        set_output(self, index, *args, **options)
        self.lora_b_stacked[index, 0, rows] = 0

    @wraps(make)
    def from_lora_tensors(
        cls: Any, lora_model_id: int, tensors: dict[str, Tensor], *args: Any, **options: Any
    ) -> Any:
        fitted = {name: _with_rows(name, tensor, rows) for name, tensor in tensors.items()}
        return make(cls, lora_model_id, fitted, *args, **options)

    vars(set_lora).update(original=set_output)
    vars(from_lora_tensors).update(original=make)
    scores.set_lora = set_lora
    adapter.from_lora_tensors = classmethod(from_lora_tensors)


def _with_rows(name: str, tensor: Tensor, rows: slice) -> Tensor:
    """An adapter's change of the input matrix, (rank, V), with columns of zeros for the appended rows."""
    missing = rows.stop - tensor.shape[-1]
    if "lora_embedding_A" not in name or tensor.shape[-1] != rows.start:
        return tensor
    return torch.nn.functional.pad(tensor, (0, missing))


class _Found(Exception):
    """Ends `compute_logits` after it has shown its matrix."""


def output_matrix(model: Any, hidden_size: int) -> Any:
    """The layer by which the model computes its logits, whatever its name in the model.

    The model passes this layer to vLLM's logits processor, and is watched there. In a model without such a
    processor, the layer is `lm_head`. It is None on a pipeline rank without this layer.

    Raises:
        UnsupportedVllm: the model computes its logits in a way of its own.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    from vllm.lora.layers import LogitsProcessorWithLoRA

    kinds = (LogitsComputation, LogitsProcessorWithLoRA)  # with adapters, the second replaces the first
    processors = [module for module in modules if isinstance(module, kinds)]
    output = _seen_by(processors, model, hidden_size) if processors else getattr(model, "lm_head", None)
    output = getattr(output, "base_layer", output)
    if output is None:
        raise UnsupportedVllm(
            f"{type(model).__name__} computes its logits in a way that the gate cannot read"
        )
    return None if isinstance(output, PPMissingLayer) else output


def _seen_by(processors: Sequence[torch.nn.Module], model: Any, hidden_size: int) -> Any:
    """The layer that the model passes to one of these logits processors; None if it calls none of them."""
    found = []

    def see(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(args[0] if args else options["lm_head"])
        raise _Found

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in processors]
    weight = next(model.parameters())
    try:
        with torch.inference_mode():
            model.compute_logits(torch.zeros(1, hidden_size, dtype=weight.dtype, device=weight.device))
    except _Found:
        return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None


def rows_of(output: Any) -> range:
    """The rows of the vocabulary that this process has of an output matrix (tensor parallel)."""
    rows = output.shard_indices
    return range(rows.org_vocab_start_index, rows.org_vocab_end_index)


def weight_of(output: Any) -> Tensor | None:
    """The weights of an output matrix, (rows, H); None if they are quantised."""
    weight = getattr(output, "weight", None)
    plain = isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return weight if plain else None


def pack_again(output: Any) -> None:
    """Renew an output matrix's copy for the CPU's kernels, if it has one, after a change of its rows."""
    if hasattr(output, "cpu_linear"):
        output.quant_method.process_weights_after_loading(output)


class PromptLengths(NamedTuple):
    """Prompt length of every request slot of the V2 runner, in tokens: (slots,)."""

    device: Tensor
    host: Any
    """The same as a numpy array."""


def prompt_lengths(req_states: Any) -> PromptLengths:
    return PromptLengths(req_states.prompt_len.gpu, req_states.prompt_len.np)


def wrap_app(app: Any, middleware: Callable[[Any], Any]) -> Any:
    """Put an ASGI middleware before all of vLLM's, whose stack is built already; returns it."""
    if app.middleware_stack is None:
        app.middleware_stack = app.build_middleware_stack()
    app.middleware_stack = middleware(app.middleware_stack)
    return app.middleware_stack


DRAFTS_WITHOUT_THE_STUDENTS_ROWS = frozenset({"ngram", "ngram_gpu", "draft_model"})


def check_speculation(config: Any) -> None:
    """Raises ConfigError if the student's speculative decoding cannot work with a gate.

    The V1 runner takes no custom logits processor together with it. With the V2 runner, drafts must come from
    the text or from a separate model. Other drafters use the student's output matrix, including the taps.
    """
    speculative = config.speculative_config
    if speculative is None:
        return
    if not config.use_v2_model_runner:
        raise ConfigError(
            "vllm's speculative-config is not supported: with it, this model runner cannot run a gate"
        )
    if speculative.method not in DRAFTS_WITHOUT_THE_STUDENTS_ROWS:
        methods = ", ".join(sorted(DRAFTS_WITHOUT_THE_STUDENTS_ROWS))
        raise ConfigError(
            f"vllm's speculative-config: method {speculative.method} is not supported, only {methods}"
        )


def answer_by_name(state: Any, model_of_request: Callable[[], str]) -> None:
    """Have every reply name its model as the request did; vLLM would give the first of the served names.

    Args:
        state: the initialised state of vLLM's app.
        model_of_request: returns the model name in the current request.
    """
    models = state.openai_serving_models
    first = models.model_name

    def model_name(lora_request: Any = None) -> str:
        sent = model_of_request()
        return sent if lora_request is None and models.is_base_model(sent) else str(first(lora_request))

    models.model_name = model_name


def keep_originals(
    renderer: Any,
    default_template: str | None,
    note: Callable[[Any, OriginalPrompt], None],
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Have vLLM's renderer report every prompt as it was before its template and tokenizer.

    Chats of every API reach the renderer as messages. A prompt of token ids has no other form.

    Args:
        renderer: the engine's renderer.
        default_template: the chat template of requests that bring none.
        note: called with the prompt that goes to the engine, and its original.
        wanted: returns whether originals are needed.
    """
    renderer.render_chat_async = _noting_chats(renderer.render_chat_async, default_template, note, wanted)
    renderer.render_cmpl_async = _noting_texts(renderer.render_cmpl_async, note, wanted)


def _noting_chats(
    render_chat: Callable[..., Any],
    default_template: str | None,
    note: Callable[[Any, OriginalPrompt], None],
    wanted: Callable[[], bool],
) -> Callable[..., Any]:
    @wraps(render_chat)
    async def chat(
        conversations: Any, chat_params: Any, tok_params: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        async def with_words(messages: Any, words: str) -> list[int] | None:
            begun = begun_with(messages, words)
            if begun is None:
                return None
            _, (prompt,) = await render_chat([begun], chat_params, tok_params, **options)
            return cast(list[int], prompt["prompt_token_ids"])

        if not wanted():
            return cast(tuple[Any, Any], await render_chat(conversations, chat_params, tok_params, **options))
        originals = []
        for messages in conversations:
            original = OriginalPrompt.of_messages(messages, chat_params, tok_params, default_template)
            original.render = partial(with_words, messages)
            originals.append(original)
        rendered, prompts = await render_chat(conversations, chat_params, tok_params, **options)
        for prompt, original in zip(prompts, originals, strict=True):
            note(prompt, original)
        return rendered, prompts

    return chat


def _noting_texts(
    render_text: Callable[..., Any], note: Callable[[Any, OriginalPrompt], None], wanted: Callable[[], bool]
) -> Callable[..., Any]:
    @wraps(render_text)
    async def text(prompts: Any, tok_params: Any = None, **options: Any) -> Any:
        async def with_words(written: str, words: str) -> list[int]:
            (prompt,) = await render_text([{"prompt": words + written}], tok_params, **options)
            return cast(list[int], prompt["prompt_token_ids"])

        texts = [prompt.get("prompt") if isinstance(prompt, dict) else None for prompt in prompts]
        rendered = await render_text(prompts, tok_params, **options)
        for prompt, written in zip(rendered, texts, strict=True):
            if isinstance(written, str) and wanted():
                original = OriginalPrompt.of_text(written, tok_params)
                original.render = partial(with_words, written)
                note(prompt, original)
        return rendered

    return text


def parses_streams(arguments: Namespace) -> bool:
    """Whether vLLM's HTTP layer parses reasoning or tool calls in streams."""
    structured = arguments.structured_outputs_config.reasoning_parser
    return bool(arguments.tool_call_parser or arguments.reasoning_parser or structured)


GRAMMAR_BACKENDS = {
    "xgrammar": "vllm.v1.structured_output.backend_xgrammar.XgrammarBackend",
    "guidance": "vllm.v1.structured_output.backend_guidance.GuidanceBackend",
    "outlines": "vllm.v1.structured_output.backend_outlines.OutlinesBackend",
    "lm-format-enforcer": "vllm.v1.structured_output.backend_lm_format_enforcer.LMFormatEnforcerBackend",
}


def grammar_backend(name: str, vllm_config: Any, tokenizer: Any) -> Any:
    """The backend of this name, which compiles the grammars of structured output."""
    module, _, backend = GRAMMAR_BACKENDS[name].rpartition(".")
    vocab_size = vllm_config.model_config.get_vocab_size()
    return getattr(import_module(module), backend)(vllm_config, tokenizer=tokenizer, vocab_size=vocab_size)


def backend_name(params: Any) -> str:
    """The backend that vLLM chose when it checked the parameters of a request with structured output."""
    return str(params.structured_outputs._backend)


def grammar_start(manager: StructuredOutputManager, request: Any, new_ids: Sequence[int]) -> int:
    """Index of the first new token that the grammar takes; more than their number before it has begun."""
    return int(manager._get_constraint_bounds(request, new_ids, spec_tokens_committed=True).grammar_start)


def is_constrained(manager: StructuredOutputManager, request: Any) -> bool:
    """Whether the grammar has begun; reasoning may come before it."""
    return bool(manager._get_constraint_bounds(request, ()).constraint_start == 0)


def grammar_fields(params: Any) -> dict[str, Any]:
    """The structured output of a request, as fields for vLLM's HTTP layer."""
    fields = vars(params.structured_outputs)
    return {name: value for name, value in fields.items() if name[0] != "_" and value not in (None, False)}


def error_info(error: Exception) -> Any:
    """The error that vLLM's server returns for an exception: `message`, `type`, `code` and `param`."""
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
    "EngineRequest",
    "GracefulHTTPError",
    "HttpLayer",
    "IncrementalDetokenizer",
    "LogitsProcessor",
    "LogitsProcessorV2",
    "Logprob",
    "LogprobsProcessor",
    "MoveDirectionality",
    "ReasoningMarkers",
    "RequestOutput",
    "RequestOutputKind",
    "Sampler",
    "SamplingParams",
    "StructuredOutputManager",
    "TokenizerLike",
    "UnsupportedVllm",
    "UsageContext",
    "VLLMValidationError",
    "answer_by_name",
    "backend_name",
    "check_speculation",
    "convert_ids_list_to_tokens",
    "current_platform",
    "data_parallel_ranks",
    "error_info",
    "grammar_backend",
    "grammar_fields",
    "grammar_start",
    "is_constrained",
    "keep_originals",
    "max_bad_words_tokens",
    "merge_async_iterators",
    "parses_streams",
    "reasoning_markers",
    "repeats",
]
