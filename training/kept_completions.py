"""Keeps a teacher's greedy completions of training prompts, because they are the same in every epoch."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from training import parallel
from training.batches import Batch
from training.kept_tokens import packed, unpacked
from training.sampling import complete
from training.teacher_cache import TeacherCache, key_of


@dataclass(frozen=True)
class KeptCompletions:
    """Kept completions by one teacher in process."""

    cache: TeacherCache
    teacher: str
    """Fingerprint of the teacher's weights."""

    def written(self, model: PreTrainedModel, batch: Batch, visible: int, end: int, longest: int) -> Batch:
        """The batch's prompts with the teacher's completions; the teacher writes only those not kept yet.

        Args:
            model: the teacher.
            batch: demonstrations; only their prompts are used.
            visible: the teacher writes only ids below this.
            end: the end-of-sequence id, also used to pad.
            longest: most tokens in a completion, including the end token.
        """
        prompts = batch.prompts()
        keys = [key_of("completion", self.teacher, visible, prompt) for prompt in prompts]
        answers: dict[int, list[int]] = {}
        for row, value in enumerate(self.cache.get(keys)):
            tokens = [] if value is None else unpacked(value)
            if tokens and (tokens[-1] == end or len(tokens) >= longest):  # others were cut short
                answers[row] = tokens[:longest]
        missing = [row for row in range(len(prompts)) if row not in answers]
        # Sharded models run in step: a process with fewer new prompts completes one of them again.
        count = int(parallel.largest(len(missing)))
        if count:
            asked = [prompts[row] for row in missing] + prompts[:1] * (count - len(missing))
            written = complete(model, asked, visible, end, longest, temperature=0)
            new = dict(zip(missing, written, strict=False))
            kept = {}
            for row, tokens in new.items():
                kept[keys[row]] = packed(tokens)
            self.cache.put(kept)
            answers |= new
        ordered = [answers[row] for row in range(len(prompts))]
        return Batch.of(prompts, ordered, end).to(batch.ids.device)
