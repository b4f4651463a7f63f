"""Sequence-level distillation: supervised fine-tuning on the teacher's own completions.

See Kim and Rush 2016, arXiv 1606.07947. Completions are greedy or drawn, in place of their beam search.
"""

from transformers import PreTrainedModel

from training.batches import Batch
from training.kept_completions import KeptCompletions
from training.method_config import SeqKDConfig
from training.methods.sft import SFT
from training.sampling import room, sampled


class SeqKD(SFT):
    """`SFT` on what the teacher writes."""

    config: SeqKDConfig
    needs_teacher = True
    kept: KeptCompletions | None = None
    """Keeps the teacher's completions of earlier epochs; None: they are written again."""

    def prepare(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """The teacher's completions of the batch's prompts. Raises ValueError for a teacher behind a URL."""
        teacher = self.teacher
        if not isinstance(teacher, PreTrainedModel):
            raise ValueError("method seqkd needs the teacher in process, not behind a URL")
        longest = room(model, batch.prompts(), self.longest)  # they must fit into the student's context, too
        if self.kept is not None and batch.comes_again and self.config.temperature == 0:
            return self.kept.written(teacher, batch, self.visible, self.end, longest)
        return sampled(teacher, batch, self.visible, self.end, self.config.temperature, longest)
