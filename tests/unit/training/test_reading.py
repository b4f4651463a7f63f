"""States and logits of every kind of model are the model's own, whole or token by token."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
)

from router.reserved import ReservedRows
from training.batches import Batch, left_padded
from training.gating.head import Head
from training.models import answer_read
from training.reading import Readout, Stepper, UnreadableModel, check_readout, check_steps
from training.sampling import complete

torch.set_num_threads(1)
ROWS, VISIBLE = 96, 64
USUAL = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ALL_HEADS = USUAL | {"num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**USUAL),
    "llama-tied": LlamaConfig(**USUAL, tie_word_embeddings=True),
    "granite": GraniteConfig(**USUAL, logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.2),
    "cohere": CohereConfig(**USUAL, logit_scale=0.0625),
    "cohere2": Cohere2Config(**USUAL, logit_scale=0.25, sliding_window=4),
    "gemma2": Gemma2Config(**USUAL, sliding_window=4, final_logit_softcapping=1.5, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**USUAL, sliding_window=4, query_pre_attn_scalar=16),
    "mistral": MistralConfig(**USUAL, sliding_window=4),
    "phi3": Phi3Config(**USUAL, sliding_window=4),
    "qwen2": Qwen2Config(**USUAL),
    "qwen2-window": Qwen2Config(**USUAL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "phi": PhiConfig(**ALL_HEADS),
    "gpt2": GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=1),
    "gpt-neox": GPTNeoXConfig(**ALL_HEADS),
    "opt": OPTConfig(**ALL_HEADS, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": BloomConfig(vocab_size=ROWS, hidden_size=32, n_layer=2, n_head=2),
}


def random_model(config):
    """A random model without dropout, whose weights and biases are large enough that logits differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.mul_(6)
        elif name.endswith("bias"):
            p.normal_()
    return model


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return random_model(CONFIGS[request.param])


def ids_of(*lengths):
    torch.manual_seed(1)
    return [torch.randint(2, VISIBLE, (n,)).tolist() for n in lengths]


def test_logits_of_answers_are_the_models_own(model):
    prompts, answers = ids_of(*(3 + i % 5 for i in range(33))), ids_of(*(2 + i % 11 for i in range(33)))
    batch = Batch.of(prompts, answers, pad=1)
    reading = answer_read(model, batch, VISIBLE)
    whole = model(batch.ids, output_hidden_states=True)
    torch.testing.assert_close(reading.logits, whole.logits[batch.answer][:, :VISIBLE], atol=1e-4, rtol=1e-4)
    states = whole.hidden_states[-1][batch.answer]
    torch.testing.assert_close(reading.states, states, atol=1e-4, rtol=1e-4)


def test_steps_of_unequal_prompts_are_the_models_own(model):
    """There are enough steps for a sliding window of four tokens to slide."""
    rows = ids_of(14, 11)
    ids, mask = left_padded([row[:-8] for row in rows], 0)
    stepper = Stepper(model)
    for step in range(8):
        _, logits = stepper.step(ids, mask)
        for i, row in enumerate(rows):
            expected = model(torch.tensor([row[: len(row) - 8 + step]])).logits[0, -1]
            torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=1e-4)
        ids = torch.tensor([[row[len(row) - 8 + step]] for row in rows])
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)


def test_the_models_of_these_tests_pass_the_check(model):
    check_steps(model, "it")
    check_readout(model, "it")


def test_taps_are_read_as_the_model_will_read_them(model):
    """The router's features of a state are those of the model that has the taps in its rows."""
    reserved = ReservedRows(VISIBLE)
    head = Head(model, reserved, 8)
    torch.manual_seed(2)
    taps = torch.randn_like(head.taps)
    head.taps.data.copy_(taps)
    batch = Batch.of(ids_of(5, 3), ids_of(4, 6), pad=1)
    states = answer_read(model, batch, VISIBLE).states
    ours = head.logits(states)
    output = model.get_output_embeddings()
    rows, before = reserved.taps, output.weight
    matrix = before.detach().clone()
    matrix[rows] = taps
    output.weight = torch.nn.Parameter(matrix, requires_grad=False)
    try:
        theirs = model(batch.ids).logits[batch.answer]
    finally:
        output.weight = before
    kept = [*range(VISIBLE), *range(rows.start, rows.stop)]
    torch.testing.assert_close(ours[:, kept], theirs[:, kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["phi", "llama"])
def test_rows_that_are_still_to_be_appended_have_no_bias(name):
    student = random_model(CONFIGS[name])
    reserved = ReservedRows(ROWS, 5)
    head = Head(student, reserved, 4)
    with torch.no_grad():
        head.taps.normal_()
        states = torch.randn(3, 32)
        logits = head.logits(states)
    assert logits.shape == (3, ROWS + 5)
    torch.testing.assert_close(logits[:, :ROWS], student.get_output_embeddings()(states))
    torch.testing.assert_close(logits[:, reserved.taps], states @ head.taps.T)


def test_every_token_of_a_greedy_completion_is_the_models_likeliest(model):
    rows = ids_of(9, 4)
    written = complete(model, rows, ROWS, 1, 12, temperature=0)
    for row, answer in zip(rows, written, strict=True):
        whole = list(row)
        for token in answer:
            assert model(torch.tensor([whole])).logits[0, -1].argmax() == token
            whole.append(token)


def test_a_model_without_a_cache_of_keys_is_refused_by_name():
    mamba = random_model(MambaConfig(vocab_size=ROWS, hidden_size=32, state_size=4, num_hidden_layers=2))
    with pytest.raises(UnreadableModel, match="hub/mamba: MambaForCausalLM"):
        check_steps(mamba, "hub/mamba")


def test_an_unknown_way_to_logits_is_refused_for_a_router():
    model = random_model(CONFIGS["llama"])
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: logits.sin())
    with pytest.raises(UnreadableModel, match="hub/sine: LlamaForCausalLM computes its logits in a way"):
        check_readout(model, "hub/sine")


def test_readouts_with_other_names_are_found():
    assert Readout.of(RecurrentGemmaConfig(logits_soft_cap=30.0)) == Readout(1.0, 30.0)
    assert Readout.of(FalconH1Config(lm_head_multiplier=0.5)) == Readout(0.5, None)
