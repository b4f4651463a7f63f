"""One process or many (`torchrun`): ranks, devices, and models sharded by FSDP2.

Without `torchrun` everything here is the identity, so that training has one code path.
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
    """Join the processes that `torchrun` started; on one machine or many."""
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
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def fast_bf16(where: torch.device) -> bool:
    """Whether it has instructions for bfloat16; without (AVX2) that takes ten times as long as float32."""
    return where.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def size() -> int:
    """How many processes there are."""
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
    """Over all processes."""
    return _reduced(value, dist.ReduceOp.MAX)


def smallest(value: float) -> float:
    """Over all processes."""
    return -largest(-value)


def any_of(flag: bool) -> bool:
    """Whether it is set in any process: loops that call a sharded model have to end together."""
    return bool(largest(float(flag)))


def _reduced(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    if size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)  # on the CPU: gloo, apart from the GPUs' own traffic
    dist.all_reduce(tensor, operation)
    return tensor.item()


def mine(items: Sequence[T]) -> Sequence[T]:
    """This process's share; `gathered` puts the shares together again."""
    return items[rank() :: size()]


def gathered(share: Sequence[T]) -> list[T]:
    """What every process got of `mine`, in the order of the whole."""
    if size() == 1:
        return list(share)
    shares: list[Sequence[T]] = [()] * size()
    dist.all_gather_object(shares, list(share))
    return [shares[i % size()][i // size()] for i in range(sum(map(len, shares)))]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, whatever their architecture calls them."""
    lists = [part for part in model.get_decoder().children() if isinstance(part, nn.ModuleList)]
    return max(lists, key=lambda part: sum(map(torch.numel, part.parameters())))


def onto_device(model: nn.Module) -> None:
    """Move the model to this process's device."""
    model.to(device())


def shard(model: PreTrainedModel) -> None:
    """Move the model to this process's device, and split it if there are several processes.

    They share its parameters, gradients and optimizer states, layer by layer (FSDP2: Zhao et al. 2023, arXiv
    2304.11277, by parameter).
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
    """All parameters and buffers, whole and on the CPU; empty in all processes but the first."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], weights)  # models have no other state


def synchronise_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over the processes; False while they accumulate."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather a sharded model's parameters once for many forward passes, as generation needs."""
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
