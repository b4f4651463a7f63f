"""The base class of all parts of a recipe."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from router.words import check_budget_prompt


class Frozen(BaseModel):
    """A part of a recipe: checked when it is built, and never changed. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Rate = Annotated[float, Field(gt=0, lt=1)]
BudgetPrompt = Annotated[str, AfterValidator(check_budget_prompt)]
