"""A teacher that is as slow as a big model and writes the same as a small one.

A tiny pair shows quality but no speed: only the engine's own work per step can be seen. So the pair's teacher
is deepened without changing its function. It gets further decoder layers whose `o_proj` and `down_proj` are
zero. They leave the residual stream as it is (zero-initialised residual branches as in Goyal et al. 2017,
arXiv 1706.02677; used to grow a model as in Net2Net, arXiv 1511.05641). The old layers get a wider
feed-forward, padded with zeros. An engine computes all of it.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from router.errors import UnusableInput

WEIGHTS = "model.safetensors"
FIRST_LAYER = "model.layers.0."
SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Matrices through which a decoder layer adds to the residual stream."""


class HeavyError(UnusableInput):
    """This checkpoint cannot be deepened; the message says why."""


@dataclass(frozen=True)
class Deepening:
    """Size of the deepened model. With a hidden size of 128, the defaults give 100 M parameters."""

    layers: int = 32
    feed_forward: int = 8192
    """Width of each layer's feed-forward."""


def deepen(source: Path, target: Path, shape: Deepening | None = None, seed: int = 0) -> int:
    """Write a checkpoint to ``target`` whose logits are those of ``source``; returns its parameters.

    Weights of further layers are random (normal, the source's `initializer_range`), but zero for `SILENT`.

    Raises:
        HeavyError: not a Llama in one safetensors file, or already larger than ``shape``.
    """
    shape = shape or Deepening()
    config = _config(source)
    old_layers = config["num_hidden_layers"]
    old_width = config["intermediate_size"]
    if shape.layers < old_layers or shape.feed_forward < old_width:
        raise HeavyError(f"{source} has {old_layers} layers of {old_width} already")
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    first_layer: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / WEIGHTS).items():
        weights[name] = _widen(name, weight, shape.feed_forward)
        if name.startswith(FIRST_LAYER):
            first_layer[name.removeprefix(FIRST_LAYER)] = weights[name]
    for layer in range(old_layers, shape.layers):
        for name, template in first_layer.items():
            new = _new(name, template, config["initializer_range"], generator)
            weights[f"model.layers.{layer}.{name}"] = new
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in (WEIGHTS, "config.json"):
            shutil.copy(file, target)
    config |= {"num_hidden_layers": shape.layers, "intermediate_size": shape.feed_forward}
    config.pop("layer_types", None)  # one entry per layer, and a Llama's are all of one kind
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, target / WEIGHTS, {"format": "pt"})
    return _size(weights)


def lengthen(source: Path, target: Path, context: int) -> None:
    """Write a checkpoint to ``target`` that is ``source`` with room for ``context`` tokens.

    Rotary embeddings have no weights. In the new part of the context, the model writes nonsense, at the same
    cost.
    """
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["max_position_embeddings"] = context
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def parameters(checkpoint: Path) -> int:
    """Number of parameters of a checkpoint in one safetensors file."""
    return _size(load_file(checkpoint / WEIGHTS))


def _size(weights: Mapping[str, torch.Tensor]) -> int:
    return sum(map(torch.numel, weights.values()))


def _config(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    if config.get("model_type") != "llama" or not (source / WEIGHTS).is_file():
        raise HeavyError(f"{source} is not a Llama in one {WEIGHTS}")
    if config.get("mlp_bias") or config.get("attention_bias"):
        raise HeavyError(f"{source} has biases: added layers would change what it writes")
    return config


def _widen(name: str, weight: torch.Tensor, width: int) -> torch.Tensor:
    """Feed-forward weights padded with zeros: silu(0) · 0 adds nothing."""
    if name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
        return torch.cat([weight, weight.new_zeros(width - weight.shape[0], weight.shape[1])])
    if name.endswith("mlp.down_proj.weight"):
        return torch.cat([weight, weight.new_zeros(weight.shape[0], width - weight.shape[1])], dim=1)
    return weight


def _new(name: str, template: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """A further layer's weight in the shape of another layer's."""
    if name in SILENT:
        return torch.zeros_like(template)
    if template.ndim == 1:  # a norm
        return torch.ones_like(template)
    return (torch.randn(template.shape, generator=generator) * scale).to(template.dtype)
