"""Joint training of a student with its gate: distillation at the positions at which the gate does not ask.

So the student's capacity is spent at the positions at which the teacher will not help.

At each position, the pair pays KL(p_T || pi) if the student writes, and the price if it asks. The gate asks
with probability q = sigmoid((score - price) / T), so the student's part of the cost is (1 - q) KL. The anchor
adds a multiple of KL, so that the student stays a language model at positions with q near 1. The gate itself
is not trained here: the router's stage fits gate and taps to the new student (alternating descent).
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from measuring.chats import with_words
from router.checkpoint import RouterCheckpoint
from router.features import confidence
from router.words import budget_text
from training.batches import Batch, BatchLoss
from training.method_config import JointConfig
from training.methods.base import Method
from training.models import answer_outputs
from training.pieces import in_pieces
from training.reading import Readout, bias_of
from training.sampling import MAX_TOKENS
from training.teacher import Teacher
from training.tokenizer import encode_prompts


class Joint(Method[JointConfig]):
    """Trains every row for a budget drawn from `rates`, at the budget's price.

    With a template, the student also reads the budget in words. Raises ValueError if the teacher is behind a
    URL.
    """

    tokenizer: PreTrainedTokenizerBase
    """The pair's tokenizer, needed only for budgets in words."""

    def __init__(
        self,
        config: JointConfig,
        visible: int,
        teacher: Teacher | None,
        end: int = 0,
        longest: int = MAX_TOKENS,
    ) -> None:
        super().__init__(config, visible, teacher, end, longest)
        if not isinstance(teacher, PreTrainedModel):
            raise ValueError("method joint needs the teacher in process, not behind a URL")
        self._local_teacher = teacher
        checkpoint = RouterCheckpoint.load(config.router)
        self.gate = checkpoint.learned_gate()
        self.taps = checkpoint.taps
        # A student that reads budgets in words must also learn prompts without words.
        self.rates = (0.0, *config.rates) if config.budget_prompt else config.rates
        self.prices = torch.tensor([checkpoint.calibration().price(rate) for rate in self.rates])

    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """The mean of the student's part of the pair's cost, with the anchor, in nats."""
        device = batch.ids.device
        drawn = torch.randint(len(self.rates), (len(batch.ids),))
        student = answer_outputs(model, self._prompted(batch, drawn), self.visible)
        with torch.no_grad():
            teacher = answer_outputs(self._local_teacher, batch, self.visible)
            price = self.prices[drawn].to(device).repeat_interleave(batch.answer.sum(1))

        def parts(piece: slice) -> Tensor:
            logits = student.logits(piece)
            with torch.no_grad():
                log_p = teacher.logits(piece).float().log_softmax(-1)
                asks = self.asking(self._tapped(model, student.states[piece]), logits, price[piece])
            log_pi = logits.float().log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_pi)).sum(-1)
            return torch.stack(((1 - asks + self.config.anchor) * kl, kl.detach(), asks), dim=1)

        loss, kl, asks = in_pieces(parts, len(price), self.visible, self.piece).mean(0)
        return BatchLoss(loss, {"loss": loss.detach(), "kl": kl.detach(), "asks": asks.detach()})

    def _tapped(self, model: PreTrainedModel, states: Tensor) -> Tensor:
        """Logits (N, taps) of the taps for states (N, H), as if the taps were rows of the model."""
        reserved = self.gate.reserved
        bias = bias_of(model, reserved.end)
        if bias is not None:
            bias = bias[reserved.taps]
        return Readout.of(model.config)(states, self.taps.to(states), bias)

    def asking(self, tapped: Tensor, logits: Tensor, price: Tensor) -> Tensor:
        """Probability (N,) that the gate asks.

        Args:
            tapped: (N, taps), logits of the taps.
            logits: (N, visible), logits of the other ids.
            price: (N,), price at each position.
        """
        gate = self.gate.to(tapped.device)
        x = torch.cat((tapped, confidence(logits, gate.reserved)), dim=-1)
        return ((gate.score(x.float()) - price) / self.config.temperature).sigmoid()

    def _prompted(self, batch: Batch, drawn: Tensor) -> Batch:
        template = self.config.budget_prompt
        if template is None:
            return batch
        words = [budget_text(template, rate) if rate else "" for rate in self.rates]
        read = zip(batch.sources, drawn.tolist(), strict=True)
        sources = [with_words(source, words[number]) for source, number in read]
        return batch.with_prompts(encode_prompts(self.tokenizer, sources), self.end)
