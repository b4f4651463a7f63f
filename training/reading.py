"""Hidden states and logits of a causal language model, in one pass or token by token.

Logits always come from the model's own forward pass. Some models scale or cap the output of their output
matrix (Granite, Cohere, Gemma 2), and some add a bias (Phi). A product with the matrix alone would leave that
out.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from router.errors import UnusableInput
from training.batches import left_padded
from training.growing_cache import growing_cache
from training.read_prompts import ReadPrompts

PROBE_TOKENS = 6
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest mean difference of the same logits computed in two ways, as a share of their mean size."""
TOLERANCE_OF_HALF = 0.05
"""Largest mean difference for 16-bit weights, as a share of the logits' mean size."""


Select = Tensor | int | tuple[slice, int]
"""Index that selects positions of (B, T)."""


class UnreadableModel(UnusableInput):
    """Training cannot read this model's states and logits as the model itself computes them."""


class Reading(NamedTuple):
    """States and logits at N positions."""

    states: Tensor
    """(N, H) the last hidden states: the input of the output matrix."""
    logits: Tensor
    """(N, V) the model's own logits, after its scaling and capping."""


@contextmanager
def head_given(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """During the block, the model's output matrix gets `change` of its input (B, T, H)."""

    def hook(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (change(inputs[0]),)

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class ReadPart(Protocol):
    """The input of one pass, e.g. a `training.batches.Batch`."""

    @property
    def ids(self) -> Tensor:
        """(B, T) token ids."""

    @property
    def answer(self) -> Tensor:
        """(B, T) bool, True at the positions to read."""


def read(model: PreTrainedModel, select: Select, **inputs: object) -> Reading:
    """States and logits at the selected positions, from one forward pass that computes no other logits.

    Args:
        model: the model that reads.
        select: index that selects positions of (B, T).
        inputs: arguments of the model's forward pass.
    """
    given: list[Tensor] = []

    def chosen(states: Tensor) -> Tensor:
        given.append(states[select])
        return given[0]

    with head_given(model, chosen):
        logits = model(**inputs).logits
    return Reading(given[0], logits)


def read_parts(model: PreTrainedModel, parts: Sequence[ReadPart], order: Tensor | slice) -> Reading:
    """States and logits of several passes, with one product of the output matrix for all of them.

    Args:
        model: the model that reads.
        parts: the input of each pass.
        order: index (N,) that brings the parts' positions, joined part after part, into the result's order.
    """
    given: list[Tensor] = []

    def gathered(states: Tensor) -> Tensor:
        given.append(states[parts[len(given)].answer])
        if len(given) < len(parts):
            return states[:0, 0]  # no logits yet
        return torch.cat(given)[order]

    with head_given(model, gathered):
        for part in parts:
            output = model(input_ids=part.ids, use_cache=False)
    return Reading(torch.cat(given)[order], output.logits)


def read_states(model: PreTrainedModel, parts: Sequence[ReadPart], order: Tensor | slice) -> Tensor:
    """The states (N, H) of `read_parts`, without computing logits."""
    given: list[Tensor] = []

    def gathered(states: Tensor) -> Tensor:
        given.append(states[parts[len(given)].answer])
        return states[:0, 0]

    with head_given(model, gathered):
        for part in parts:
            model(input_ids=part.ids, use_cache=False)
    return torch.cat(given)[order]


@dataclass(frozen=True)
class Readout:
    """Computes logits from last hidden states: cap * tanh(scale * (states @ weight.T + bias) / cap).

    It serves rows that are not in the model yet, such as the router's taps.
    """

    scale: float = 1.0
    cap: float | None = None
    """Bound of the logits; None: no bound."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Readout":
        """The readout of a model, from the fields for scale and cap in transformers' configurations."""
        text = config.get_text_config()
        scale = getattr(text, "logit_scale", None) or getattr(text, "lm_head_multiplier", None) or 1.0
        divisor = getattr(text, "logits_scaling", None) or 1.0
        cap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
        return cls(scale / divisor, cap)

    def __call__(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits (N, rows) of states (N, H), for rows with this weight (rows, H) and bias (rows,)."""
        products = states @ weight.T
        return self.shaped(products if bias is None else products + bias)

    def shaped(self, products: Tensor) -> Tensor:
        """Logits from the products of the output matrix, which include its bias."""
        if self.scale != 1.0:
            products = products * self.scale
        if self.cap is not None:
            products = torch.tanh(products / self.cap) * self.cap
        return products


def bias_of(model: PreTrainedModel, rows: int) -> Tensor | None:
    """The bias (rows,) of the output matrix, 0 for rows that the model does not have yet; None: no bias."""
    bias: Tensor | None = getattr(model.get_output_embeddings(), "bias", None)
    if bias is None:
        return None
    return functional.pad(bias, (0, max(0, rows - len(bias))))


def attends_everywhere(config: PreTrainedConfig) -> bool:
    """Whether every layer sees all earlier tokens: no sliding window, no chunks, no bias by distance."""
    kinds = set(getattr(config, "layer_types", None) or ())
    slides = kinds != {"full_attention"} if kinds else getattr(config, "sliding_window", None) is not None
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return not slides and not chunked and not getattr(config, "alibi", False)


def context_of(model: PreTrainedModel) -> int:
    """Number of tokens that the model can read at once; `sys.maxsize` if its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


class Started(NamedTuple):
    """B rows whose beginning a model has read."""

    reading: Reading
    """States and logits at the end of each row."""
    mask: Tensor
    """(B, T) mask of all tokens so far; 0 is padding."""


class Stepper:
    """Runs one model step by step, with a key-value cache for the rows that are being written."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = growing_cache()
        config = model.config.get_text_config()
        # A sliding window counts padding too, so padding between two parts would shorten its reach.
        self._in_parts = attends_everywhere(config)
        # This attention takes the mask as it is, so no other mask is built at every step.
        self._plain = config._attn_implementation == "sdpa" and self._in_parts

    def start(
        self,
        prompts: Sequence[list[int]],
        begun: Sequence[list[int]],
        pad: int,
        kept: ReadPrompts | None = None,
    ) -> Started:
        """Read B prompts with the tokens after them. Equal prompts are read once.

        Args:
            prompts: the prompt of each row, as token ids.
            begun: the tokens after each prompt. If a row has none, all rows are read in one pass.
            pad: token id to fill rows up with.
            kept: prompts that were read before; the prompts read now are added to it.
        """
        in_parts = self._in_parts and all(begun)
        if in_parts and kept is not None and kept.has(self._model, prompts):
            for number, layer in enumerate(kept.batch(self._model, prompts)):
                self._cache.update(layer.keys, layer.values, number)
            return self._go_on(left_padded(list(prompts), pad, self._model.device).mask, begun, pad)
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        if in_parts and len(places) < len(prompts):
            distinct = list(map(list, places))
            mask = self._read(distinct, pad).mask
            if kept is not None:
                kept.add(self._model, distinct, self._cache)
            rows = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=mask.device)
            self.keep(rows)
            return self._go_on(mask[rows], begun, pad)
        started = self._read([[*prompt, *tokens] for prompt, tokens in zip(prompts, begun, strict=True)], pad)
        if kept is not None and self._in_parts and not any(begun):
            kept.add(self._model, prompts, self._cache)
        return started

    def _read(self, rows: list[list[int]], pad: int) -> Started:
        ids, mask = left_padded(rows, pad, self._model.device)
        return Started(self.step(ids, mask), mask)

    def _go_on(self, mask: Tensor, begun: Sequence[list[int]], pad: int) -> Started:
        """Read the begun tokens after the prompts in the cache, which have this mask."""
        ids, seen = left_padded(list(begun), pad, self._model.device)
        mask = torch.cat((mask, seen), dim=1)
        return Started(self.step(ids, mask), mask)

    def step(self, ids: Tensor, mask: Tensor) -> Reading:
        """States (B, H) and logits (B, V) after the last of the new tokens.

        Args:
            ids: (B, S), the new tokens.
            mask: (B, T), the mask of all tokens so far, with the new ones; 0 is padding.
        """
        if ids.shape[1] == 1:
            positions = mask.sum(-1, keepdim=True) - 1
            if self._plain:
                mask = mask.bool()[:, None, None]
        else:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return read(
            self._model,
            (slice(None), -1),
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._cache.batch_select_indices(rows)


@torch.no_grad()
def check_steps(model: PreTrainedModel, name: str) -> None:
    """Raises UnreadableModel if the model's logits differ between one pass and token by token."""
    ids = probe_ids(model)
    try:
        with torch.compiler.set_stance("force_eager"):
            whole = model(input_ids=ids, use_cache=False).logits[0]
            stepper = Stepper(model)
            padded = torch.cat((ids.new_zeros(1, 2), ids), dim=1)  # 2 of padding, as a shorter prompt has
            mask = (torch.arange(padded.shape[1], device=ids.device) >= 2).long()[None]
            stepped = [stepper.step(padded[:, :4], mask[:, :4]).logits[0]]
            for end in range(5, padded.shape[1] + 1):
                stepped.append(stepper.step(padded[:, end - 1 : end], mask[:, :end]).logits[0])
    except (TypeError, AttributeError, RuntimeError, IndexError, ValueError) as error:
        raise UnreadableModel(
            f"{name}: {type(model).__name__} cannot be run token by token: {error}"
        ) from error
    if differ(torch.stack(stepped), whole[1:], model.dtype):
        raise UnreadableModel(
            f"{name}: {type(model).__name__}, run token by token, gives other logits than in one pass"
        )


def check_readout(model: PreTrainedModel, name: str) -> None:
    """Raises UnreadableModel if `Readout` does not reproduce the model's logits: taps would be misread."""
    if not is_followed(model):
        raise UnreadableModel(
            f"{name}: {type(model).__name__} computes its logits in a way that a router cannot follow"
        )


_followed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_followed(model: PreTrainedModel) -> bool:
    """Whether `Readout` reproduces the model's logits; tried once for each model."""
    if model not in _followed:
        _followed[model] = _follows(model)
    return _followed[model]


@torch.no_grad()
def _follows(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    with torch.compiler.set_stance("force_eager"), torch.autocast(model.device.type, enabled=False):
        states, logits = read(model, 0, input_ids=probe_ids(model), use_cache=False)
        again = Readout.of(model.config)(states, head.weight, getattr(head, "bias", None))
    return again.shape == logits.shape and not differ(again, logits, model.dtype)


def probe_ids(model: PreTrainedModel) -> Tensor:
    """A few token ids (1, T) to compare models on."""
    rows = model.config.get_text_config().vocab_size
    return (torch.arange(PROBE_TOKENS, device=model.device) * 7 + 3)[None] % rows


def differ(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors of the same logits differ by more than rounding, for weights of this type."""
    ours = ours.float()
    theirs = theirs.float()
    allowed = TOLERANCE.get(dtype, TOLERANCE_OF_HALF)
    return not bool((ours - theirs).abs().mean() <= allowed * theirs.abs().mean().clamp(min=1e-6))
