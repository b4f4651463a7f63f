"""A model that knows one text by heart, so tests know what parsers of tool calls and reasoning read."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN = 128  # one dimension for each token and each reserved row
PROMPT, UNKNOWN, END = "<prompt>", "<unknown>", "<end>"


def save_reciter(pieces: Sequence[str], directory: Path) -> None:
    """Save a Llama that answers every prompt with ``pieces``. Each piece is one token, and no two are equal.

    Its only layer does nothing, so the last token alone determines the next one.
    """
    tokens = [PROMPT, *pieces, END, UNKNOWN]
    if len(set(tokens)) < len(tokens) or len(tokens) > HIDDEN - 1:
        raise ValueError(f"expected at most {HIDDEN - 4} different pieces")
    _save_tokenizer(tokens, directory)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    config = LlamaConfig(
        vocab_size=HIDDEN,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokens.index(END),
        tie_word_embeddings=False,
        **shape,
        **heads,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(HIDDEN))
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        for i in range(tokens.index(END)):
            model.lm_head.weight[i + 1, i] = 2.0  # times the norm, the root of HIDDEN: the token is certain
    model.save_pretrained(directory)


def _save_tokenizer(tokens: Sequence[str], directory: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    # Not special, or they would be left out of the text that the parsers read.
    tokenizer.add_tokens([token for token in tokens if token.startswith("<")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END,
        chat_template=PROMPT,
    ).save_pretrained(directory)
