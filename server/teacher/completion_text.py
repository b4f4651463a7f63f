"""The text of a completion so far, for teachers that read text."""

from server.choice import Choice
from server.completion import new_detokenizer
from server.teacher.words import UNFINISHED, StudentWords
from server.vllm_api import RequestOutputKind, SamplingParams, TokenizerLike

BYTES_OF_A_CHARACTER = 4


class CompletionText:
    """Follows a completion in whole characters."""

    def __init__(self, words: StudentWords, tokenizer: TokenizerLike, choice: Choice) -> None:
        """``tokenizer``: the student's tokenizer, as its engine has it."""
        self._words = words
        self._choice = choice
        reading = SamplingParams(output_kind=RequestOutputKind.DELTA)  # without stop strings
        self._reader = new_detokenizer(tokenizer, choice.prompt_ids, reading)
        self._known = 0
        """Number of the student's ids that were read."""
        self.text = ""
        """Text up to the last whole character, as of the last `read`."""
        self._unread = 0
        """Number of the student's last ids that are not in the text."""

    @property
    def half_written(self) -> bool:
        """Whether the student's last tokens are a part of a character."""
        self.read()
        if not 0 < self._unread < BYTES_OF_A_CHARACTER:
            return False  # a longer run is no character, however it goes on
        ids = self._choice.completion.token_ids[-self._unread :]
        return self._words.decode(ids).endswith(UNFINISHED)

    def read(self) -> None:
        """Add the text that was written since the last `read`."""
        written = self._choice.completion.token_ids
        unread = written[self._known :]
        self._known = len(written)
        for token_id in unread:
            self._reader.update([token_id], False)
            text = self._reader.get_next_output_text(False, True)
            self.text += text
            self._unread = 0 if text else self._unread + 1
