"""vLLM's engine for the student, whose `generate` lets two models write one completion."""

from collections.abc import AsyncGenerator
from typing import Any

from router.reserved import ReservedRows
from server.cooperation import Cooperation
from server.cooperator import Cooperator
from server.gate_processor import visible_rows_of
from server.grammar.constraint import Grammars
from server.student import StudentEngine
from server.vllm_api import AsyncLLM, RequestOutput, SamplingParams, data_parallel_ranks, reasoning_markers
from server.whole_vocabulary import reports_all, tokens_only


class CooperativeEngine(AsyncLLM):
    """vLLM's engine; every request that its HTTP layer makes goes through a `Cooperator`.

    Set ``cooperation`` before the first request.
    """

    _cooperator: Cooperator | None = None

    @property
    def cooperation(self) -> Cooperation:
        """Settings by which student and teacher write together; AttributeError before they are set."""
        if self._cooperator is None:
            raise AttributeError("cooperation is not set yet")
        return self._cooperator.cooperation

    @cooperation.setter
    def cooperation(self, cooperation: Cooperation) -> None:
        if self._cooperator is None:
            self._cooperator = Cooperator(self._student(cooperation.reserved), cooperation)
        else:
            self._cooperator.cooperation = cooperation

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`; see `Cooperator.generate`."""
        if self._cooperator is None:
            raise AttributeError("cooperation is not set yet")
        return self._cooperator.generate(prompt, sampling_params, request_id, **options)

    def _student(self, reserved: ReservedRows) -> StudentEngine:
        def check(prompt: Any, params: SamplingParams, request_id: str, **options: Any) -> SamplingParams:
            request = self.input_processor.process_inputs(
                request_id,
                prompt,
                params,
                supported_tasks=("generate",),
                lora_request=options.get("lora_request"),
                data_parallel_rank=options.get("data_parallel_rank"),
            )
            if request.sampling_params is None:
                raise TypeError("not a request for a completion")
            return request.sampling_params

        plain = super().generate
        visible = visible_rows_of(self.vllm_config.additional_config)

        def generate(
            prompt: Any, params: SamplingParams, request_id: str, **options: Any
        ) -> AsyncGenerator[RequestOutput, None]:
            outputs = plain(prompt, params, request_id, **options)
            return tokens_only(outputs, visible) if reports_all(params) else outputs

        return StudentEngine(
            generate=generate,
            check=check,
            tokenizer=self.renderer.tokenizer,
            max_model_len=self.model_config.max_model_len,
            reserved=reserved,
            markers=reasoning_markers(self.vllm_config),
            ranks=data_parallel_ranks(self.vllm_config.parallel_config),
            constrain=Grammars(self.vllm_config).constrain,
        )
