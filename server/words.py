"""Budgets in words, served: a student whose router wants them reads the request's budget in its prompt.

Nobody else sees the words: teachers, usage, echoes and records have the prompt as it was sent.
"""

from router.policy import Policy
from router.words import BudgetWords
from server.choice import Choice


async def say_budget(choice: Choice, words: BudgetWords, policy: Policy, context: int) -> None:
    """Let the student read the request's budget, where its prompt and its context have a place for it.

    Args:
        choice: that has just begun.
        words: of the router.
        policy: that spends the budget.
        context: of the student, in tokens. The words take their room there.
    """
    original = choice.original
    if original is None or original.render is None:  # token ids: nobody knows where a message begins
        return
    end = choice.length + choice.completion.tokens_left
    text = words.text(policy.rate(choice.bucket, choice.length, end, choice.prefix_tokens))
    if text is None:
        return
    try:
        ids = await original.render(text)
    except ValueError:  # too long with the words
        return
    if ids is not None and len(ids) < context:
        choice.read_by_student = ids
        choice.completion.max_tokens = min(choice.completion.max_tokens, context - len(ids))
