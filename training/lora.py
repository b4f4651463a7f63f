"""Low-rank adapters by `peft`, put inside the model itself: other code uses it as before."""

import warnings
from collections.abc import Iterator

import peft
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from router.errors import UnusableInput
from training.model_config import LoraConfig


class LoraError(UnusableInput):
    """The adapters cannot be trained, or cannot be exported exactly; the message names the module."""


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Add adapters to a model in place, and freeze all other weights.

    Raises:
        LoraError: the model does not have a target, or the target's adapter cannot be merged into plain
            weights.
    """
    _check_targets(model, config)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft computes with fractions too
        lora_dropout=config.dropout,
        target_modules=config.targets if config.targets == "all-linear" else list(config.targets),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of things that are checked here or that it corrects
            peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise LoraError(f"lora.targets: {str(error).splitlines()[0]}") from error
    for name, layer in adapted(model):
        if not isinstance(layer, lora.Linear | lora.Embedding):
            raise LoraError(f"lora.targets: the adapter of {name} cannot be merged into plain weights")


def adapted(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The modules with an adapter, each with its name."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def merged(weights: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The plain weights of a model: its adapters are added to the weights that they belong to.

    Args:
        weights: all weights of the model, with those of its adapters.
        model: the model with the adapters.
    """
    plain = {}
    for name, tensor in weights.items():
        if ".lora_" not in name:
            plain[name.replace(".base_layer.", ".")] = tensor
    for name, layer in adapted(model):
        change = _change(weights, name, layer)
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight.float() + change.float()).to(weight.dtype)
    return plain


def _change(weights: dict[str, Tensor], name: str, layer: BaseTunerLayer) -> Tensor:
    """The change that a layer's adapter adds to the layer's weight."""
    (adapter,) = layer.active_adapters
    if isinstance(layer, lora.Embedding):
        down = weights[f"{name}.lora_embedding_A.{adapter}"]
        up = weights[f"{name}.lora_embedding_B.{adapter}"]
        turned = True
    elif isinstance(layer, lora.Linear):
        down = weights[f"{name}.lora_A.{adapter}.weight"]
        up = weights[f"{name}.lora_B.{adapter}.weight"]
        turned = layer.fan_in_fan_out  # GPT-2 stores its matrices transposed
    else:
        raise LoraError(f"the adapter of {name} cannot be merged into plain weights")
    return layer.scaling[adapter] * transpose(up @ down, turned)


def _check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Check that each target exists and shares its weight with no other module, which would change too."""
    shared = _shared_weights(model)
    for target in () if config.targets == "all-linear" else config.targets:
        found = {}
        for name, module in model.named_modules():
            if name == target or name.endswith("." + target):
                found[name] = module
        if not found:
            raise LoraError(f"lora.targets: {type(model).__name__} has no module named {target}")
        for name, module in found.items():
            _check_target(name, module, shared)


def _check_target(name: str, module: nn.Module, shared: set[int]) -> None:
    if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        raise LoraError(f"lora.targets: {name} is a {type(module).__name__}, which cannot have an adapter")
    if not shared.isdisjoint(map(id, module.parameters(recurse=False))):
        raise LoraError(
            f"lora.targets: {name} shares its weight with another module of this model "
            "(tie_word_embeddings), so its adapter cannot be merged; name other modules"
        )


def _shared_weights(model: PreTrainedModel) -> set[int]:
    """Ids of parameters that several modules use."""
    found: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        own = set(map(id, module.parameters(recurse=False)))
        shared |= own & found
        found |= own
    return shared
