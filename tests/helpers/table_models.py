"""Models whose next token depends on the last one alone, by a table, so tests know what a model knows."""

from collections.abc import Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.helpers.tiny_models import END, RESERVED, VISIBLE

HIDDEN = 64  # a dimension for each visible token
NATS = 4.0
"""Logit of the table's token above every other token's."""


def model_of(table: Mapping[int, int]) -> PreTrainedModel:
    """A model that writes ``table[token]`` after a token. Its only layer does nothing."""
    config = LlamaConfig(
        vocab_size=RESERVED.end,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.data.zero_()
    made.model.embed_tokens.weight.data[:VISIBLE, :VISIBLE] = torch.eye(VISIBLE)
    made.model.norm.weight.data.fill_(1.0)
    for token, after in table.items():
        made.lm_head.weight.data[after, token] = NATS / HIDDEN**0.5  # the norm makes 1 the root of HIDDEN
    return made
