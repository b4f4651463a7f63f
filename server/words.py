"""Budgets in words: a student whose router was trained with them reads the request's budget in its prompt.

Only the student sees these words: teachers, usage, echoes and records have the prompt as it was sent.
"""

from router.policy import Policy
from router.words import BudgetWords
from server.choice import Choice


async def say_budget(choice: Choice, words: BudgetWords, policy: Policy, context: int) -> None:
    """Let the student read the request's budget, if its prompt and its context have room for the words.

    Args:
        choice: a choice that has just begun.
        words: the router's wording of budgets.
        policy: the policy that spends the budget.
        context: length of the student's context, in tokens; it includes the words.
    """
    original = choice.original
    if original is None or original.render is None:  # token ids: the beginning of a message is not known
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
