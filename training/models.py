"""Models: a small Llama from scratch, any Hugging Face causal LM from a directory, and their logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from router.reserved import RESERVED_ROWS, ReservedRows
from router.rows import append_rows, vocabulary_rows
from training.batches import Batch
from training.config import RecipeError
from training.hub import directory_of
from training.lora import add_lora
from training.model_config import ModelConfig, PretrainedConfig, PrunedConfig, ScratchConfig, Shape
from training.parallel import blocks_of, is_sharded
from training.pruning import pruned
from training.reading import Reading, Readout, is_followed, read, read_parts, read_states
from training.tokenizer import visible_ids


def check_adapters(config: PretrainedConfig) -> None:
    """Raises LoraError for adapters that the model cannot have; needs its configuration alone."""
    if config.lora is not None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(directory_of(config.pretrained))
            )
        add_lora(model, config.lora)


def build(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int, teacher: Path
) -> PreTrainedModel:
    """The model to train, on the CPU.

    Args:
        config: of the model.
        tokenizer: of the pair.
        seed: of new weights.
        teacher: the exported one, for a student that begins with its layers.

    Raises:
        RecipeError: it has too few rows for the tokenizer, or the teacher cannot be pruned.
    """
    if isinstance(config, ScratchConfig):
        return new_model(config.shape, tokenizer, seed)
    dtype = getattr(torch, config.dtype)
    if isinstance(config, PrunedConfig):
        name = str(teacher)
        model = pruned(teacher, config.prune.layers, dtype)
    else:
        name = config.pretrained
        model = AutoModelForCausalLM.from_pretrained(directory_of(name), dtype=dtype)
    rows = model.config.get_text_config().vocab_size
    if rows < visible_ids(tokenizer):
        raise RecipeError(f"{name} has {rows} rows for the tokenizer's {visible_ids(tokenizer)} ids")
    if isinstance(config, PretrainedConfig) and config.lora is not None:
        torch.manual_seed(seed)
        add_lora(model, config.lora)
    return model


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Freshly initialised, with the reserved rows after the tokenizer's ids."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=visible_ids(tokenizer) + RESERVED_ROWS,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    if shape.dropout:
        add_dropout(model, shape.dropout)
    return model


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Residual dropout (Vaswani et al. 2017), which Llama has not.

    It works in passes with a gradient only, so that a model writes its own completions without it. Nothing of
    it is saved.
    """

    def drop(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return dropout(output, rate, training=module.training and torch.is_grad_enabled())

    model.get_decoder().embed_tokens.register_forward_hook(drop)
    for layer in blocks_of(model):
        layer.get_submodule("self_attn.o_proj").register_forward_hook(drop)
        layer.get_submodule("mlp.down_proj").register_forward_hook(drop)


def recompute_layers(model: PreTrainedModel) -> None:
    """Activations of a layer are computed again in the backward pass (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        RecipeError: the architecture cannot do that.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise RecipeError(f"schedule.gradient_checkpointing: {error}") from error


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """On the CPU."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def load_with_rows(student: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Like `load_model`; a student that has no row for a router gets them, as it does when it is served."""
    reserved = ReservedRows.for_model(vocabulary_rows(student), visible_ids(tokenizer))
    if reserved.end <= vocabulary_rows(student):
        return load_model(student)
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / "student"
        append_rows(student, copy, reserved)
        return load_model(copy)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """A directory that stock vLLM serves."""
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def reserved_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ReservedRows:
    """Of a vocabulary that has no row to spare: those that its copies get, see `router.rows`."""
    return ReservedRows.for_model(model.config.get_text_config().vocab_size, visible_ids(tokenizer))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameters(model: PreTrainedModel, *, trained_only: bool = False) -> int:
    """How many numbers the model has, or how many of them are trained."""
    counted = trained(model) if trained_only else model.parameters()
    return sum(map(torch.numel, counted))


@dataclass(frozen=True)
class Outputs:
    """What a model makes of N positions. Its logits are computed when they are read, a piece at a time."""

    states: Tensor
    """(N, H)."""
    logits: Callable[[slice], Tensor]
    """A slice of the positions -> their logits (n, visible)."""

    def whole(self) -> Reading:
        """All logits at once."""
        return Reading(self.states, self.logits(slice(None)))


def answer_outputs(model: PreTrainedModel, batch: Batch, visible: int) -> Outputs:
    """At the positions that predict the answers.

    Only over the tokenizer's ids: the reserved rows belong to the router.
    """
    if is_sharded(model):  # every pass gathers the parameters again
        reading = read(model, batch.answer, input_ids=batch.ids, use_cache=False)
        return _computed(reading, visible)
    narrow = batch.narrow()
    if not is_followed(model):
        return _computed(read_parts(model, narrow.parts, narrow.order), visible)
    states = read_states(model, narrow.parts, narrow.order)
    head = model.get_output_embeddings()
    readout = Readout.of(model.config)
    return Outputs(states, lambda piece: readout.shaped(head(states[piece]))[:, :visible])


def _computed(reading: Reading, visible: int) -> Outputs:
    """Of a model whose logits exist already."""
    return Outputs(reading.states, lambda piece: reading.logits[piece, :visible])


def answer_read(model: PreTrainedModel, batch: Batch, visible: int) -> Reading:
    """States (N, H) and logits (N, visible), see `answer_outputs`."""
    return answer_outputs(model, batch, visible).whole()
