"""Low-rank adapters by `peft`, inside the model itself: to everything else it stays the same model."""

from __future__ import annotations

import peft
import torch
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


def merged(weights: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """`weights`, all of the model's, with its adapters added to what they belong to, and gone."""
    plain = {n.replace(".base_layer.", "."): t for n, t in weights.items() if ".lora_" not in n}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            (adapter,) = module.active_adapters
            down, up = (weights[f"{name}.lora_{part}.{adapter}.weight"] for part in "AB")
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + module.scaling[adapter] * (up @ down)
    return plain
