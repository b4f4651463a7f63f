"""Sequence-level distillation: supervised fine-tuning on the teacher's own completions (Kim and Rush 2016,
arXiv 1606.07947); greedy ones in place of their beam.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from training.batches import Batch
from training.methods.sft import SFT
from training.sampling import sampled


class SeqKD(SFT):
    needs_teacher = True

    def prepare(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """Raises ValueError for a teacher behind a URL."""
        if not isinstance(self.teacher, PreTrainedModel):
            raise ValueError("method seqkd needs the teacher in process, not behind a URL")
        return sampled(self.teacher, batch, self.visible, self.end, self.config.temperature)
