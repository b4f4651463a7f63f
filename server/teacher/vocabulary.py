"""The check that a server of the teacher has the student's vocabulary."""

from router.vocabulary import Question, Tokenizer, questions
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError


class SameVocabulary:
    """Asks a stock vLLM server all that tells its vocabulary from the student's.

    What is asked is made once. A server answers within a second, also for 150,000 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        """``tokenizer``: the student's; ids below ``rows`` that it does not have must be nobody's."""
        self._questions: list[Question] = questions(tokenizer, rows)

    async def __call__(self, teacher: Teacher) -> None:
        """Compare.

        Raises:
            TeacherError: the vocabularies differ, or the server does not answer.
        """
        for question in self._questions:
            try:
                answer = await teacher.ask(question.path, question.body)
            except TeacherError as error:
                if question.optional and error.reason == "status":
                    continue
                raise
            if problem := question.difference(answer):
                message = f"the teacher at {teacher.name} has another vocabulary than the student: {problem}"
                raise TeacherError("nonsense", message)
