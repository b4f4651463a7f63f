"""Depth pruning: makes a student that starts as a few of its teacher's layers."""

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from training.config import RecipeError
from training.hub import directory_of
from training.parallel import blocks_of

OTHER_LISTS = ("architectures", "bos_token_id", "eos_token_id")
"""Lists in a configuration that have no entry for each layer, even if their length is the layer count."""


def kept_layers(layers: int, kept: int) -> list[int]:
    """Numbers of the layers that a student keeps: the first, the last, and others evenly spaced between."""
    if kept == 1:
        return [0]
    return [i * (layers - 1) // (kept - 1) for i in range(kept)]


def check_layers(layers: int, kept: int) -> None:
    """Raises RecipeError if the teacher has fewer layers than the student is to keep."""
    if kept > layers:
        raise RecipeError(f"student.prune.layers {kept}: the teacher has {layers} layers")


def layers_of(name: str) -> int:
    """Number of layers in the configuration of the model with this directory or hub name."""
    return int(AutoConfig.from_pretrained(directory_of(name)).get_text_config().num_hidden_layers)


def pruned(teacher: Path, kept: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The teacher with `kept` of its layers and everything else unchanged.

    The student is built anew from the smaller configuration, and takes the teacher's weights. So each layer
    has the number and the type of attention that it will have in the exported model.

    Raises:
        RecipeError: there is no teacher yet, it has fewer layers, or its layers differ in kind, so that
            weights of one do not fit in the place of another.
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
    """The configuration of a model that has only the chosen layers.

    Lists with an entry for each layer, such as `layer_types`, keep the entries of the chosen layers.

    Raises:
        RecipeError: the decoder has another number of layers than the configuration.
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
    """Common prefix of the names of the layers' weights, e.g. `model.layers.`."""
    blocks = blocks_of(model)
    (prefix,) = {name for name, module in model.named_modules() if module is blocks}
    return f"{prefix}."


def renumbered(weights: dict[str, Tensor], prefix: str, chosen: list[int]) -> dict[str, Tensor]:
    """The weights without the layers that are not chosen; the chosen layers are numbered from 0."""
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
