"""Training in one process or in many (`torchrun`): ranks, devices, and models sharded by FSDP2.

With one process, sums, shares and shards leave their input as it is, so training has a single code path.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

T = TypeVar("T")


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that `torchrun` started, on one machine or many, for the length of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """This process's GPU, or the CPU if there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def fast_bf16(where: torch.device) -> bool:
    """Whether a device has bfloat16 instructions; without them bfloat16 is ten times slower than float32."""
    return where.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process logs, exports and writes checkpoints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if size() > 1:
        largest(0)


def total(value: float) -> float:
    """Sum over all processes."""
    return _reduced(value, dist.ReduceOp.SUM)


def largest(value: float) -> float:
    """Maximum over all processes."""
    return _reduced(value, dist.ReduceOp.MAX)


def smallest(value: float) -> float:
    """Minimum over all processes."""
    return -largest(-value)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process. Loops that call a sharded model must end together."""
    return bool(largest(float(flag)))


def _reduced(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    if size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)  # on the CPU, so gloo sends it, not nccl
    dist.all_reduce(tensor, operation)
    return tensor.item()


def mine(items: Sequence[T]) -> Sequence[T]:
    """This process's share of the items; `gathered` puts the shares together again."""
    return items[rank() :: size()]


def gathered(share: Sequence[T]) -> list[T]:
    """The shares of all processes, put together in the order of the list that `mine` divided."""
    if size() == 1:
        return list(share)
    shares: list[Sequence[T]] = [()] * size()
    dist.all_gather_object(shares, list(share))
    return [shares[i % size()][i // size()] for i in range(sum(map(len, shares)))]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, whatever name the architecture gives them."""
    lists = [part for part in model.get_decoder().children() if isinstance(part, nn.ModuleList)]
    return max(lists, key=lambda part: sum(map(torch.numel, part.parameters())))


def onto_device(model: nn.Module) -> None:
    """Move the model to this process's device."""
    model.to(device())


def shard(model: PreTrainedModel) -> None:
    """Move the model to this process's device, and split it if there are several processes.

    Each process holds a part of its parameters, gradients and optimizer states, layer by layer (FSDP2: Zhao
    et al. 2023, arXiv 2304.11277, by parameter).
    """
    onto_device(model)
    if size() == 1:
        return
    for layer in blocks_of(model):
        fully_shard(layer)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold the model together."""
    return isinstance(model, FSDPModule)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters and buffers of a model, whole and on the CPU; empty in all processes but the first."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], weights)  # models have no other state


def synchronise_gradients(model: nn.Module, now: bool) -> None:
    """Set whether the next backward pass reduces gradients over the processes; False to accumulate them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Keep a sharded model's parameters gathered during the block, for the many passes of generation."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
