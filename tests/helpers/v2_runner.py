"""Parts of vLLM's V2 model runner on a CPU: its own classes, with its Triton kernels written out in torch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample import bad_words, logprob, penalties, sampler
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.spec_decode import rejection_sampler


class Kernel:
    """A function that is called as a kernel of Triton: ``kernel[grid](...)``."""

    def __init__(self, program: Callable[..., None]) -> None:
        self.program = program

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.program


def top_log_softmax(output: Tensor, logits: Tensor, _stride: int, ids: Tensor, *_: Any, **__: Any) -> None:
    output.copy_(logits.float().log_softmax(-1).gather(-1, ids))


def ranks(output: Tensor, logits: Tensor, _stride: int, ids: Tensor, *_: Any, **__: Any) -> None:
    output.copy_((logits >= logits.gather(-1, ids[:, None].long())).sum(-1))


def flatten_sampled(
    flat: Tensor, sampled: Tensor, _stride: int, counts: Tensor, ends: Tensor, **_: Any
) -> None:
    for request, count in enumerate(counts.tolist()):
        start = int(ends[request])
        flat[start : start + count] = sampled[request, :count]


def count_tokens(
    slots: Tensor, ids: Tensor, _ids_stride: int, prompts: Tensor, ends: Tensor, *rest: Any, **_: Any
) -> None:
    """The kernel of `bincount`: packed bits of the prompt's tokens, and counts of the other tokens."""
    mask, _mask_stride, counts, _counts_stride = rest
    for slot in slots.tolist():
        for place in range(int(ends[slot])):
            token = int(ids[slot, place])
            if place < int(prompts[slot]):
                mask[slot, token // 32] |= 1 << token % 32
            else:
                counts[slot, token] += 1


def mask_bad_words(
    logits: Tensor,
    _stride: int,
    slots: Tensor,
    words: Tensor,
    _words: int,
    ends: Tensor,
    _ends: int,
    *rest: Any,
) -> None:
    """The kernel of `apply_bad_words`, without drafts."""
    counts, ids, _ids_stride, prompts, totals, *_ = rest
    for row, slot in enumerate(slots.tolist()):
        written = ids[slot, int(prompts[slot]) : int(totals[slot])].tolist()
        for place in range(int(counts[slot])):
            *before, last = words[slot, int(ends[slot, place]) : int(ends[slot, place + 1])].tolist()
            if len(before) <= len(written) and written[len(written) - len(before) :] == before:
                logits[row, last] = -torch.inf


def use_torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "_topk_log_softmax_kernel", Kernel(top_log_softmax))
    monkeypatch.setattr(logprob, "_ranks_kernel", Kernel(ranks))
    monkeypatch.setattr(penalties, "_bincount_kernel", Kernel(count_tokens))
    monkeypatch.setattr(bad_words, "_bad_words_kernel", Kernel(mask_bad_words))
    monkeypatch.setattr(rejection_sampler, "_flatten_sampled_kernel", Kernel(flatten_sampled))
    monkeypatch.setattr(logprob.triton, "next_power_of_2", lambda n: n, raising=False)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)


def request_states(prompts: list[int], vocabulary: int) -> LogitsProcRequestState:
    """Slots whose prompts have these lengths; needs `use_torch_kernels`."""
    lengths = buffer_utils.UvaBackedTensor(len(prompts), dtype=torch.int32)
    lengths.np[:] = prompts
    lengths.copy_to_uva()
    unused: Any = None
    return LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=len(prompts),
        vocab_size=vocabulary,
        all_token_ids=unused,
        prompt_len=lengths,
        prefill_len=lengths,
        total_len=unused,
    )


def context(slots: list[int], pos: list[int]) -> LogitsContext:
    """The context of one step: every row's slot and position. Several rows of one slot are its drafts."""
    requests = list(dict.fromkeys(slots))
    bounds = [max(p for s, p in zip(slots, pos, strict=True) if s == slot) + 1 for slot in requests]
    return LogitsContext(
        expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
        idx_mapping=torch.tensor(requests, dtype=torch.int32),
        idx_mapping_np=np.array(requests, dtype=np.int32),
        expanded_local_pos=torch.tensor([slots[:row].count(slot) for row, slot in enumerate(slots)]),
        input_ids=torch.zeros(len(slots), dtype=torch.int32),
        pos=torch.tensor(pos),
        seq_lens_upper_bound_np=np.array(bounds, dtype=np.int32),
    )


def sampler_with(processor: Any, slots: int) -> sampler.Sampler:
    """The part of vLLM's sampler that prepares logits, with one custom processor and no other parameters."""
    bare = object.__new__(sampler.Sampler)
    bare.logits_processors = [processor]
    bare.needs_logits_processing = np.zeros(slots, dtype=bool)
    bare.thinking_budget_state = SimpleNamespace(apply=lambda logits, ctx: None)
    bare.sampling_states = SimpleNamespace(
        apply_temperature=lambda logits, *_: None,
        apply_min_p=lambda logits, *_: None,
        apply_top_k_top_p=lambda logits, *_: logits,
    )
    return bare
