"""The private names of vLLM that the gateway uses, looked up in vLLM: a failed test names what moved.

No engine is started. Each test names one function of `server.vllm_api`.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock

import pytest
import torch
import vllm
from fastapi import FastAPI
from vllm.config.reasoning import ReasoningConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.config.structured_outputs import StructuredOutputsBackend
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine.core import EngineCore
from vllm.v1.sample.sampler import Sampler
from vllm.v1.structured_output import ConstraintBounds, StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputBackend
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from server import vllm_api
from server.config import ConfigError
from server.vllm_api import (
    UnsupportedVllm,
    answer_by_name,
    check_speculation,
    count_from,
    find_counts,
    find_reports,
    keep_from_adapters,
    output_matrix,
    pack_again,
    reasoning_markers,
    repeats,
    rows_of,
    weight_of,
    wrap_app,
)

SOURCE = Path(vllm.__file__).parent
SAMPLERS = "v1/worker/gpu/sample"


def sources(folder: str) -> dict[str, str]:
    """Text of vLLM's modules below a folder, by name."""
    found = {}
    for file in sorted((SOURCE / folder).rglob("*.py")):
        name = ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts)
        found[name] = file.read_text()
    return found


# find_reports


@pytest.mark.parametrize("v2", [False, True])
def test_reports_take_the_logits_first(v2):
    for report in find_reports(v2=v2):
        first = next(iter(inspect.signature(report.function).parameters))
        assert first in ("logits", "logprobs"), f"{report.name} takes {first} first"


def test_every_place_of_the_v2_runner_that_reports_is_known():
    known = {module for module, _ in vllm_api.REPORTS_V2}
    pattern = re.compile(r"\bcompute_(topk_scores|token_logprobs)\b")
    users = {name for name, text in sources("v1/worker/gpu").items() if pattern.search(text)}
    assert users == known, "vLLM reports scores in other places than `REPORTS_V2` has"


def test_a_missing_report_is_named(monkeypatch):
    monkeypatch.setattr(vllm_api, "REPORTS_V2", (("vllm.v1.worker.gpu.sample.logprob", "compute_gone"),))
    with pytest.raises(UnsupportedVllm, match=r"not supported: it has no .*\.logprob\.compute_gone"):
        find_reports(v2=True)
    monkeypatch.setattr(vllm_api, "REPORTS_V1", (("vllm.v1.nowhere", "Sampler.compute_logprobs"),))
    with pytest.raises(UnsupportedVllm, match=r"not supported: it has no vllm\.v1\.nowhere\.Sampler"):
        find_reports(v2=False)


# find_counts, count_from


@pytest.mark.parametrize("v2", [False, True])
def test_functions_that_count_a_requests_tokens_tell_them_from_the_prompt(v2):
    for (_, _, argument), count in zip(
        vllm_api.COUNTS_V2 if v2 else vllm_api.COUNTS_V1, find_counts(v2=v2), strict=True
    ):
        assert argument in inspect.signature(count.function).parameters


def test_every_place_of_the_v2_sampler_that_tells_output_from_prompt_is_known():
    """At the other places, biases need it for `min_tokens`, and watermarks and traces are the operator's."""
    counted = {module.rpartition(".")[2] for module, _, _ in vllm_api.COUNTS_V2}
    users = {name.rpartition(".")[2] for name, text in sources(SAMPLERS).items() if "prompt_len" in text}
    others = {"logit_bias", "prompt_logprob", "interface", "trace_replay", "watermark"}
    assert users == counted | others


def test_the_v1_sampler_hands_its_output_ids_to_the_functions_that_count_them():
    text = inspect.getsource(Sampler)
    assert "apply_all_penalties(" in text
    assert "apply_bad_words(logits, bad_words_token_ids, output_token_ids)" in text


def test_a_missing_count_is_named(monkeypatch):
    place = ("vllm.v1.sample.sampler", "apply_bad_words")
    monkeypatch.setattr(vllm_api, "COUNTS_V1", ((*place, "gone"),))
    with pytest.raises(UnsupportedVllm, match="apply_bad_words takes no gone"):
        count_from(lambda ids: ids, v2=False)
    monkeypatch.setattr(vllm_api, "COUNTS_V1", ((place[0], "apply_gone", "ids"),))
    with pytest.raises(UnsupportedVllm, match=r"not supported: it has no .*\.apply_gone"):
        count_from(lambda ids: ids, v2=False)


# output_matrix, weight_of, rows_of, pack_again

HIDDEN = 4


class Scores(LogitsProcessor):
    """vLLM's logits processor, without its configuration."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


class Model(torch.nn.Module):
    """A model of vLLM whose output matrix has a given name."""

    def __init__(self, name: str, output: torch.nn.Module) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(8, HIDDEN)
        self.logits_processor = Scores()
        self.name = name
        if name != "embed_tokens":
            setattr(self, name, output)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(getattr(self, self.name), hidden_states)


class Nested(torch.nn.Module):
    """A model of text and images, whose language model computes the logits."""

    def __init__(self, language_model: Model) -> None:
        super().__init__()
        self.language_model = language_model

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.language_model.compute_logits(hidden_states)


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "output", "embed_tokens"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_output_matrix_is_found_whatever_its_name(name, nested):
    model = Model(name, torch.nn.Embedding(8, HIDDEN))
    found = output_matrix(Nested(model) if nested else model, HIDDEN)
    assert found is getattr(model, name)
    assert not model.logits_processor._forward_pre_hooks, "the model is left as it was"


def test_a_rank_of_a_pipeline_may_have_none():
    assert output_matrix(Model("lm_head", PPMissingLayer()), HIDDEN) is None


def test_a_model_with_logits_of_its_own_is_named():
    class Own(torch.nn.Module):
        pass

    with pytest.raises(UnsupportedVllm, match="Own computes its logits in a way that the gate cannot read"):
        output_matrix(Own(), HIDDEN)


def test_every_model_hands_its_matrix_to_vllms_logits_processor_first():
    first = list(inspect.signature(LogitsProcessor.forward).parameters)[1]
    assert first == "lm_head"


@pytest.mark.parametrize(
    ("weight", "plain"),
    [
        (torch.zeros(2, 2), True),
        (torch.zeros(2, 2, dtype=torch.bfloat16), True),
        (torch.zeros(2, 2, dtype=torch.int8), False),
        (torch.zeros(2, 2).to(torch.float8_e4m3fn), False),
        (None, False),
    ],
)
def test_quantised_rows_cannot_be_written(weight, plain):
    assert (weight_of(SimpleNamespace(weight=weight)) is not None) == plain
    assert weight_of(SimpleNamespace()) is None


def test_rows_are_named_as_vllm_names_them():
    source = inspect.getsource(VocabParallelEmbedding)
    assert "self.shard_indices" in source
    text = sources("model_executor/layers")["vllm.model_executor.layers.vocab_parallel_embedding"]
    assert "def org_vocab_start_index" in text or "org_vocab_start_index: int" in text
    indices = SimpleNamespace(org_vocab_start_index=8, org_vocab_end_index=12)
    assert rows_of(SimpleNamespace(shard_indices=indices)) == range(8, 12)


def test_packed_copies_are_named_as_vllm_names_them():
    texts = sources("model_executor/layers")
    assert any("layer.cpu_linear = " in text for text in texts.values())
    packed = []
    method = SimpleNamespace(process_weights_after_loading=packed.append)
    plain, copied = SimpleNamespace(quant_method=method), SimpleNamespace(quant_method=method, cpu_linear=1)
    pack_again(plain)
    pack_again(copied)
    assert packed == [copied]


# keep_from_adapters, and an output matrix under adapters

ROUTERS = slice(6, 8)
"""The router's rows in a vocabulary of eight."""


@pytest.fixture
def adapted_scores(monkeypatch):
    """vLLM's scores under adapters. Their state belongs to a class, and is restored afterwards."""
    monkeypatch.setattr(LogitsProcessorWithLoRA, "set_lora", LogitsProcessorWithLoRA.set_lora)
    monkeypatch.setattr(LoRAModel, "from_lora_tensors", LoRAModel.__dict__["from_lora_tensors"])
    keep_from_adapters(ROUTERS)
    scores = LogitsProcessorWithLoRA.__new__(LogitsProcessorWithLoRA)
    torch.nn.Module.__init__(scores)
    scores.base_layer = Scores()
    scores.lora_a_stacked = torch.zeros(2, 1, 3, HIDDEN)
    scores.lora_b_stacked = torch.zeros(2, 1, 8, 3)
    return scores


@pytest.mark.parametrize("rows", [6, 8])
def test_no_adapter_changes_the_routers_rows(adapted_scores, rows):
    """This holds even for an adapter of a student that has these rows itself and has trained them."""
    adapted_scores.set_lora(1, torch.ones(2, HIDDEN), torch.ones(rows, 2))
    assert adapted_scores.lora_b_stacked[1, 0, :6, :2].eq(1).all()
    assert adapted_scores.lora_b_stacked[1, 0, ROUTERS].eq(0).all()


def test_an_adapter_of_the_original_fits_a_copy_with_more_rows(adapted_scores):
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors = {f"{name}A": torch.ones(2, 6), f"{name}B": torch.ones(HIDDEN, 2)}
    helper = PEFTHelper(r=2, lora_alpha=2, target_modules=["embed_tokens"])
    made = LoRAModel.from_lora_tensors(
        lora_model_id=1, tensors=tensors, peft_helper=helper, device="cpu", model_vocab_size=8
    )
    (weights,) = made.loras.values()
    assert weights.lora_a.tolist() == [[1.0] * 6 + [0.0] * 2] * 2
    with pytest.raises(RuntimeError, match="must be consistent"):  # as before for other models
        LoRAModel.from_lora_tensors(
            lora_model_id=1,
            tensors=tensors | {f"{name}A": torch.ones(2, 5)},
            peft_helper=helper,
            device="cpu",
            model_vocab_size=8,
        )


def test_the_output_matrix_is_found_under_adapters(adapted_scores):
    model = Model("lm_head", torch.nn.Embedding(8, HIDDEN))
    model.logits_processor = adapted_scores
    assert output_matrix(model, HIDDEN) is model.lm_head


# prompt_lengths, and what the V2 adapter reads of a step


def test_the_v2_runner_tells_what_the_gate_reads():
    assert "prompt_len" in LogitsProcRequestState.__dataclass_fields__
    needed = {"expanded_idx_mapping", "idx_mapping_np", "pos", "seq_lens_upper_bound_np"}
    assert needed <= LogitsContext.__dataclass_fields__.keys()


# reasoning_markers, repeats


def test_markers_of_thinking_are_named_as_vllm_names_them():
    reasoning = ReasoningConfig()
    assert reasoning_markers(SimpleNamespace(reasoning_config=None)) is None
    assert reasoning_markers(SimpleNamespace(reasoning_config=reasoning)) is None, "no parser, no markers"
    reasoning._reasoning_start_token_ids = [1]
    reasoning._natural_reasoning_end_token_ids = [2]
    reasoning._reasoning_end_token_ids = [3, 2]
    reasoning._enabled = True
    assert reasoning_markers(SimpleNamespace(reasoning_config=reasoning)) == ((1,), (2,), (3, 2))


def test_a_repetition_is_what_vllm_calls_one():
    params = vllm_api.SamplingParams(
        repetition_detection=RepetitionDetectionParams(max_pattern_size=2, min_count=2)
    )
    assert [repeats(ids, params) for ids in ([1, 2], [1, 1], [1, 2, 1, 2])] == [False, True, True]
    assert not repeats([1, 1], vllm_api.SamplingParams())
    text = inspect.getsource(check_stop)
    order = ("eos_token_id", "request.max_tokens", "params.min_tokens", "check_sequence_repetition")
    assert sorted(order, key=text.index) == list(order)
    assert "repetition_detected" in text


# wrap_app


async def test_our_middleware_is_before_all_others():
    seen = []

    def named(name):
        def wrap(app):
            async def middleware(scope, receive, send):
                seen.append(name)

            return middleware if name == "inner" else _then(seen, name, app)

        return wrap

    app = FastAPI()
    wrap_app(app, named("inner"))
    outer = wrap_app(app, named("outer"))
    assert app.middleware_stack is outer
    await app({"type": "http"}, None, None)
    assert seen == ["outer", "inner"]


def _then(seen, name, app):
    async def middleware(scope, receive, send):
        seen.append(name)
        await app(scope, receive, send)

    return middleware


# answer_by_name

NAMES = ("wheels", "wheels-best")


@pytest.mark.parametrize(
    ("sent", "answered"),
    [("wheels", "wheels"), ("wheels-best", "wheels-best"), ("", "wheels"), ("no-model", "wheels")],
)
def test_a_reply_has_the_name_that_was_sent(sent, answered):
    paths = [BaseModelPath(name=name, model_path="/student") for name in NAMES]
    models = OpenAIServingModels(MagicMock(), paths)
    answer_by_name(SimpleNamespace(openai_serving_models=models), lambda: sent)
    assert models.model_name() == models.model_name(None) == answered
    assert models.model_name(LoRARequest("an-adapter", 1, "/adapter")) == "an-adapter"


# check_speculation


def configured(method: str | None, v2: bool) -> SimpleNamespace:
    speculative = None if method is None else SimpleNamespace(method=method)
    return SimpleNamespace(speculative_config=speculative, use_v2_model_runner=v2)


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "draft_model"])
def test_drafters_without_the_students_rows_are_welcome(method):
    check_speculation(configured(method, v2=True))
    check_speculation(configured(None, v2=False))


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "dflash", "dspark", "medusa"])
def test_drafters_that_share_the_students_rows_are_refused(method):
    with pytest.raises(ConfigError, match=f"method {method} is not supported, only draft_model, ngram"):
        check_speculation(configured(method, v2=True))


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle"])
def test_the_v1_runner_has_no_gate_with_drafts(method):
    with pytest.raises(ConfigError, match="speculative-config is not supported: with it, this model runner"):
        check_speculation(configured(method, v2=False))


def test_vllm_still_refuses_processors_with_drafts_in_the_v1_runner():
    text = sources("v1/sample/logits_processor")["vllm.v1.sample.logits_processor.__init__"]
    assert "STR_SPEC_DEC_REJECTS_LOGITSPROCS" in text, "the V1 runner may take a gate with drafts now"
    assert "method" in SpeculativeConfig.__dataclass_fields__


def test_a_draft_model_of_its_own_shares_nothing_with_the_student():
    text = sources("v1/worker/gpu/spec_decode/standalone_ar")
    assert not any("lm_head" in each for each in text.values())


# keep_originals


def test_chats_and_texts_are_rendered_by_these_functions():
    from vllm.renderers import BaseRenderer, ChatParams, TokenizeParams
    from vllm.renderers.online_renderer import OnlineRenderer

    for function in (BaseRenderer.render_chat_async, BaseRenderer.render_cmpl_async):
        assert "tok_params" in inspect.signature(function).parameters
    chats = inspect.getsource(OnlineRenderer.preprocess_chat)
    assert re.search(r"renderer\.render_chat_async\(\s+\[messages\],\s+chat_params,\s+tok_params,", chats)
    texts = inspect.getsource(OnlineRenderer.preprocess_cmpl)
    assert re.search(r"renderer\.render_cmpl_async\(\s+parsed_prompts,\s+tok_params,", texts)
    assert {"chat_template", "chat_template_kwargs"} <= ChatParams.__dataclass_fields__.keys()
    assert {"add_special_tokens", "truncate_prompt_tokens"} <= TokenizeParams.__dataclass_fields__.keys()
    assert "chat_template" in inspect.signature(OnlineRenderer).parameters


def test_every_api_renders_its_chats_there():
    for name in ("openai/chat_completion", "anthropic"):
        assert "online_renderer.render_chat" in (SOURCE / "entrypoints" / name / "serving.py").read_text()
    responses = (SOURCE / "entrypoints/openai/responses/serving.py").read_text()
    assert "online_renderer.render_responses" in responses


# Grammars: `server.grammar.manager`, and the names that it uses


def test_the_manager_of_grammars_has_all_replaced_and_called_names():
    signatures = {
        "grammar_init": ["self", "request"],
        "_create_grammar": ["self", "request"],
        "accept_tokens": ["self", "request", "new_token_ids"],
        "validate_tokens": ["self", "request", "spec_tokens"],
        "_get_constraint_bounds": ["self", "request", "spec_tokens", "spec_tokens_committed"],
    }
    for name, parameters in signatures.items():
        assert list(inspect.signature(getattr(StructuredOutputManager, name)).parameters) == parameters
    assert "self._create_grammar" in inspect.getsource(StructuredOutputManager.grammar_init)
    assert {"grammar_start", "constraint_start"} <= set(ConstraintBounds._fields)


def test_the_engine_hands_its_manager_of_grammars_to_its_scheduler():
    text = inspect.getsource(EngineCore.__init__)
    assert text.index("StructuredOutputManager(vllm_config)") < text.index("get_scheduler_cls()")
    assert "structured_output_manager=self.structured_output_manager" in text
    assert "self.structured_output_manager.grammar_init(" in inspect.getsource(EngineCore)
    scheduler = inspect.getsource(Scheduler)
    assert "self.structured_output_manager.grammar_bitmask(" in scheduler
    assert "self.structured_output_manager.accept_tokens(" in scheduler


def test_both_runners_mask_by_the_grammar_before_the_gate_reads():
    v1 = sources("v1/worker")["vllm.v1.worker.gpu_model_runner"]
    assert v1.index("            apply_grammar_bitmask(") < v1.index("self._sample(logits,")
    v2 = sources("v1/worker/gpu")["vllm.v1.worker.gpu.model_runner"]
    assert v2.index(".apply_grammar_bitmask(") < v2.index("self.sampler(logits, input_batch)")


def test_every_backend_of_grammars_is_known():
    assert {"auto", *vllm_api.GRAMMAR_BACKENDS} == set(get_args(StructuredOutputsBackend))
    for path in vllm_api.GRAMMAR_BACKENDS.values():
        module, _, name = path.rpartition(".")
        assert issubclass(getattr(import_module(module), name), StructuredOutputBackend)


def test_a_grammar_is_sent_as_the_http_layer_takes_it():
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "null"}))
    params.structured_outputs._backend = "xgrammar"
    assert vllm_api.backend_name(params) == "xgrammar"
    fields = vllm_api.grammar_fields(params)
    assert fields == {"json": {"type": "null"}}
    request = CompletionRequest(prompt=[1], structured_outputs=fields)
    assert request.structured_outputs.json == {"type": "null"}
