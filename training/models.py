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
    """Raises LoraError if the model cannot have the recipe's adapters; only its configuration is loaded."""
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
        config: the recipe's configuration of the model.
        tokenizer: the tokenizer of the pair.
        seed: seed of new weights.
        teacher: directory of the exported teacher, for a student that starts from its layers.

    Raises:
        RecipeError: the model has too few rows for the tokenizer, or the teacher cannot be pruned.
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
    """A Llama of this shape with new weights, and with the reserved rows after the tokenizer's ids."""
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
    """Add residual dropout (Vaswani et al. 2017), which Llama does not have.

    It works only in passes with a gradient, so a model writes its own completions without dropout. It is not
    saved with the model.
    """

    def drop(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return dropout(output, rate, training=module.training and torch.is_grad_enabled())

    model.get_decoder().embed_tokens.register_forward_hook(drop)
    for layer in blocks_of(model):
        layer.get_submodule("self_attn.o_proj").register_forward_hook(drop)
        layer.get_submodule("mlp.down_proj").register_forward_hook(drop)


def recompute_layers(model: PreTrainedModel) -> None:
    """Make the backward pass recompute the layers' activations (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        RecipeError: the architecture does not support it.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise RecipeError(f"schedule.gradient_checkpointing: {error}") from error


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a directory, on the CPU, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def load_with_rows(student: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The student of a directory, on the CPU. If it has no rows for a router, they are appended.

    The gateway appends the same rows when it serves the student. The directory is not changed.
    """
    reserved = ReservedRows.for_model(vocabulary_rows(student), visible_ids(tokenizer))
    if reserved.end <= vocabulary_rows(student):
        return load_model(student)
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / "student"
        append_rows(student, copy, reserved)
        return load_model(copy)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a model and its tokenizer to a directory that stock vLLM can serve."""
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def reserved_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ReservedRows:
    """The router's rows in a model; if its vocabulary has none to spare, those that its copies get.

    See `router.rows`.
    """
    return ReservedRows.for_model(model.config.get_text_config().vocab_size, visible_ids(tokenizer))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameters(model: PreTrainedModel, *, trained_only: bool = False) -> int:
    """Number of parameters in the model, or of those that are trained."""
    counted = trained(model) if trained_only else model.parameters()
    return sum(map(torch.numel, counted))


@dataclass(frozen=True)
class Outputs:
    """A model's outputs at N positions. The logits are computed when they are needed, piece by piece."""

    states: Tensor
    """(N, H) the last hidden states."""
    logits: Callable[[slice], Tensor]
    """Computes the logits (n, visible) of a slice of the positions."""

    def whole(self) -> Reading:
        """States and logits of all positions at once."""
        return Reading(self.states, self.logits(slice(None)))


def answer_outputs(model: PreTrainedModel, batch: Batch, visible: int) -> Outputs:
    """The model's outputs at the positions that predict a batch's answers.

    The logits are only over the `visible` first ids: the reserved rows belong to the router.
    """
    if is_sharded(model):  # every pass gathers the parameters again, so there is only one
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
    """The outputs of a model whose logits are computed already."""
    return Outputs(reading.states, lambda piece: reading.logits[piece, :visible])


def answer_read(model: PreTrainedModel, batch: Batch, visible: int) -> Reading:
    """States (N, H) and logits (N, visible) at the positions that predict a batch's answers."""
    return answer_outputs(model, batch, visible).whole()
