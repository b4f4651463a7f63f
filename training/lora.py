"""Low-rank adapters by `peft`, inside the model itself: to everything else it stays the same model."""

from __future__ import annotations

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from training.config import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """In place; all other weights are frozen."""
    targets = config.targets if config.targets == "all-linear" else list(config.targets)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
        ),
        model,
    )


def merge_lora(model: PreTrainedModel) -> None:
    """Add the adapters to the weights they belong to, in place; a model without any stays as it is."""
    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
