"""A student that starts as a few of its teacher's layers (depth pruning)."""

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from training.config import RecipeError
from training.hub import directory_of
from training.parallel import blocks_of

OTHER_LISTS = ("architectures", "bos_token_id", "eos_token_id")
"""Of a configuration; they may have as many entries as there are layers."""


def kept_layers(layers: int, kept: int) -> list[int]:
    """Which of the layers a student keeps: the first, the last, and others evenly spaced between them."""
    if kept == 1:
        return [0]
    return [i * (layers - 1) // (kept - 1) for i in range(kept)]


def check_layers(layers: int, kept: int) -> None:
    """Raises RecipeError if the teacher has fewer layers than the student is to keep."""
    if kept > layers:
        raise RecipeError(f"student.prune.layers {kept}: the teacher has {layers} layers")


def layers_of(name: str) -> int:
    """How many layers the model of a directory or hub name has, by its configuration."""
    return int(AutoConfig.from_pretrained(directory_of(name)).get_text_config().num_hidden_layers)


def pruned(teacher: Path, kept: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The teacher with this many of its layers, all else as it is.

    The student is built anew from the smaller configuration, and takes the teacher's weights. So a layer's
    number, and what its type says of its attention, are what the exported model will have too.

    Raises:
        RecipeError: there is no teacher yet, it has fewer layers, or their kinds do not fit together.
    """
    if not (teacher / "config.json").exists():
        raise RecipeError(f"student.prune: no teacher in {teacher}: train it first (--stage teacher)")
    source = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    layers = len(blocks_of(source))
    check_layers(layers, kept)
    chosen = kept_layers(layers, kept)
    student = AutoModelForCausalLM.from_config(fewer(source.config, layers, chosen), dtype=dtype)
    weights = renumbered(source.state_dict(), prefix_of_blocks(source), chosen)
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise RecipeError(
            f"student.prune: the layers of {type(source).__name__} differ in kind: {first}"
        ) from error
    return student


def fewer(config: PreTrainedConfig, layers: int, chosen: list[int]) -> PreTrainedConfig:
    """The configuration of a model with the chosen layers alone.

    Lists with an entry for each layer, such as `layer_types`, keep the entries of these layers.
    """
    config = deepcopy(config)
    text = config.get_text_config()
    if text.num_hidden_layers != layers:
        raise RecipeError(
            f"student.prune: {config.model_type} has {layers} layers in its decoder, and "
            f"{text.num_hidden_layers} by its configuration"
        )
    for name, value in list(vars(text).items()):
        by_layer = isinstance(value, list | tuple) and len(value) == layers
        if by_layer and not name.startswith("_") and name not in OTHER_LISTS:
            setattr(text, name, [value[i] for i in chosen])
    text.num_hidden_layers = len(chosen)
    return config


def prefix_of_blocks(model: PreTrainedModel) -> str:
    """Of the names of the blocks' weights, e.g. `model.layers.`."""
    blocks = blocks_of(model)
    (prefix,) = {name for name, module in model.named_modules() if module is blocks}
    return f"{prefix}."


def renumbered(weights: dict[str, Tensor], prefix: str, chosen: list[int]) -> dict[str, Tensor]:
    """Without the layers that are not chosen; the others are counted from 0."""
    new = {old: i for i, old in enumerate(chosen)}
    found = {}
    for name, tensor in weights.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) in new:
                found[f"{prefix}{new[int(number)]}.{rest}"] = tensor
        else:
            found[name] = tensor
    return found
