"""The check that a server of the teacher has the student's vocabulary."""

import logging

from router.vocabulary import OTHER_SPLIT, Question, Tokenizer, questions
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError

logger = logging.getLogger(__name__)


class SameVocabulary:
    """Asks a stock vLLM server all that tells its vocabulary from the student's.

    What is asked is made once. A server answers within a second, also for 150,000 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        """``tokenizer``: the student's; ids below ``rows`` that it does not have must be nobody's."""
        self._questions: list[Question] = questions(tokenizer, rows)

    async def __call__(self, teacher: Teacher) -> None:
        """Compare. The first text that is split in another way is logged; a pair can do with that.

        Raises:
            TeacherError: the vocabularies differ, or the server does not answer.
        """
        warned = False
        for question in self._questions:
            try:
                answer = await teacher.ask(question.path, question.body)
            except TeacherError as error:
                if question.optional and error.reason == "status":
                    continue
                raise
            problem = question.difference(answer)
            if problem and not question.binding and not warned:
                logger.warning("the teacher at %s %s: %s", teacher.name, OTHER_SPLIT, problem)
                warned = True
            if problem and question.binding:
                message = f"the teacher at {teacher.name} has another vocabulary than the student: {problem}"
                raise TeacherError("nonsense", message)
