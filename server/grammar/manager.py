"""vLLM's grammars, as the student's engine and the gateway both use them.

The gateway continues a completion by a longer prompt, for which vLLM would start its grammar again. Here the
grammar of a segment takes the completion so far before vLLM masks the first logits. The gate may ask at any
place before the grammar's end.
"""

import json
import threading
from functools import cache
from typing import Any

import numpy as np

from router.reserved import ReservedRows
from server.gate_processor import SETTINGS
from server.grammar.strings import without_control_characters
from server.grammar.white_space import with_little_white_space
from server.vllm_api import StructuredOutputManager, backend_name, grammar_backend
from server.written import GRAMMAR_FROM

XGRAMMAR = "xgrammar"
SCHEDULER = "scheduler"
"""Key in the engine's settings: the operator's own scheduler, if there is one."""


class GrammarManager(StructuredOutputManager):
    """vLLM's manager of grammars, with a backend for every request.

    vLLM chooses a backend by what a schema needs, but keeps the first request's for all later ones.
    Gateway and engine see different first requests, and have to agree on every token.
    """

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.set_up()

    def set_up(self) -> None:
        """Add the attributes that vLLM's own manager does not have."""
        self.backends: dict[str, Any] = {}
        self.building = threading.Lock()

    def backend_of(self, request: Any) -> Any:
        """The backend that vLLM chose when it checked this request; built at its first use."""
        name = backend_name(request.sampling_params)
        with self.building:
            if name not in self.backends:
                self.backends[name] = grammar_backend(name, self.vllm_config, self.tokenizer)
            return self.backends[name]

    def grammar_init(self, request: Any) -> None:
        """Start to compile the grammar of a new request."""
        if request.structured_output_request is not None and self.backend is None:
            self.backend = self.backend_of(request)  # it allocates the bitmask, which is the same for all
        super().grammar_init(request)

    def repaired(self, params: Any) -> dict[str, str]:
        """The fields of a request's structured output that are used in another form, by name.

        Bounds of a string's length become a pattern, see `server.grammar.strings`. With
        `disable_any_whitespace`, the JSON of tool calls has little white space too.
        """
        outputs = params.structured_outputs
        if backend_name(params) != XGRAMMAR:
            return {}
        if outputs.structural_tag is not None:
            tag = json.dumps(without_control_characters(json.loads(outputs.structural_tag)))
            if self.vllm_config.structured_outputs_config.disable_any_whitespace:
                tag = with_little_white_space(tag)
            return {"structural_tag": tag}
        if outputs.json is not None:
            schema = json.loads(outputs.json) if isinstance(outputs.json, str) else outputs.json
            sound = without_control_characters(schema)
            return {} if sound == schema else {"json": json.dumps(sound)}
        return {}

    def _create_grammar(self, request: Any) -> Any:
        kind, text = request.structured_output_request.structured_output_key
        text = next(iter(self.repaired(request.sampling_params).values()), text)
        stop_token_ids = request.sampling_params.all_stop_token_ids
        return self.backend_of(request).compile_grammar(kind, text, stop_token_ids=stop_token_ids)

    def compile(self, request: Any) -> Any:
        """The request's grammar, at its beginning. It may take seconds."""
        return self._create_grammar(request)


class EngineGrammars(GrammarManager):
    """The manager of the student's engine, whose requests are segments."""

    reserved: ReservedRows

    @classmethod
    def take_over(cls, manager: Any, reserved: ReservedRows) -> None:
        """Turn the engine's own manager into this class, because the engine has made it and keeps it."""
        manager.__class__ = cls
        manager.reserved = reserved
        manager.set_up()

    def _create_grammar(self, request: Any) -> Any:
        grammar = super()._create_grammar(request)
        start = (request.sampling_params.extra_args or {}).get(GRAMMAR_FROM)
        written = [] if start is None else list(request.prompt_token_ids[start:])
        if written and not grammar.accept_tokens(request.request_id, written):
            raise ValueError(
                f"the grammar of request {request.request_id} refuses the text that is already written"
            )
        return grammar

    def grammar_bitmask(
        self,
        requests: dict[str, Any],
        structured_output_request_ids: list[str],
        scheduled_spec_decode_tokens: dict[str, list[int]],
    ) -> Any:
        """The masks of vLLM with the reserved rows allowed: the gate reads them and masks them afterwards."""
        bitmask = super().grammar_bitmask(
            requests, structured_output_request_ids, scheduled_spec_decode_tokens
        )
        if bitmask is None:
            return None
        row = 0
        for request_id in structured_output_request_ids:
            first = row
            row += 1 + len(scheduled_spec_decode_tokens.get(request_id, ()))
            if not _may_only_end(requests[request_id], bitmask[first:row]):
                open_rows(bitmask[first:row], self.reserved)
        return bitmask

    def accept_tokens(self, request: Any, new_token_ids: list[int]) -> bool:
        """Advance the grammar by the sampled tokens, without the escalation token that ends a segment."""
        if new_token_ids and new_token_ids[-1] >= self.reserved.escalation:
            new_token_ids = new_token_ids[:-1]
        return bool(super().accept_tokens(request, new_token_ids))


def _may_only_end(request: Any, bitmask: Any) -> bool:
    """Whether `min_tokens` forbids all tokens that the grammar allows.

    vLLM then allows an end anyway, but only if nothing else is allowed. So no reserved row may be allowed.
    """
    params = request.sampling_params
    if request.num_output_tokens >= params.min_tokens:
        return False
    bits = bitmask.view(np.uint32).copy()
    for token_id in params.all_stop_token_ids:
        bits[:, token_id // 32] &= ~np.uint32(1 << token_id % 32)
    return not bits.any()


def open_rows(bitmask: Any, reserved: ReservedRows) -> None:
    """Allow the reserved rows at every position; bitmask: (positions, words) int32, changed in place."""
    first, bits = _bits_of(reserved)
    bitmask.view(np.uint32)[:, first : first + len(bits)] |= bits


@cache
def _bits_of(reserved: ReservedRows) -> tuple[int, Any]:
    """The first word of a mask that has reserved rows, and the bits to set from there on."""
    first = reserved.start // 32
    bits = np.zeros((reserved.end - 1) // 32 + 1 - first, np.uint32)
    for row in range(reserved.start, reserved.end):
        bits[row // 32 - first] |= np.uint32(1 << row % 32)
    return first, bits


def scheduler(*, vllm_config: Any, structured_output_manager: Any, **options: Any) -> Any:
    """Make vLLM's scheduler in the engine's process, after changing the engine's manager of grammars.

    vLLM calls this function in place of a scheduler's class. It is the one place where the engine's process
    takes code by name, also if the workers are processes of their own (tensor parallel).
    """
    settings = vllm_config.additional_config[SETTINGS]
    EngineGrammars.take_over(structured_output_manager, ReservedRows(*settings["reserved"]))
    config = vllm_config.scheduler_config
    config.scheduler_cls = settings.get(SCHEDULER)
    return config.get_scheduler_cls()(
        vllm_config=vllm_config, structured_output_manager=structured_output_manager, **options
    )


def install_scheduler(vllm_config: Any) -> None:
    """Have the engine's process make its scheduler by the function `scheduler`."""
    config = vllm_config.scheduler_config
    vllm_config.additional_config[SETTINGS][SCHEDULER] = config.scheduler_cls
    config.scheduler_cls = f"{scheduler.__module__}.{scheduler.__name__}"
