"""A model that knows one text by heart: what parsers of tool calls and reasoning read is then known."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN = 128  # one dimension for each token, those of the reserved rows among them
PROMPT, UNKNOWN, END = "<prompt>", "<unknown>", "<end>"


def save_reciter(pieces: Sequence[str], directory: Path) -> None:
    """Save a Llama that answers every prompt with ``pieces``, a token each, no two of them the same.

    Its only layer does nothing, so the last token alone says which is the next.
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
            model.lm_head.weight[i + 1, i] = 2.0  # times the norm, the root of HIDDEN: a sure thing
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
