"""Validation errors in one line."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from router.address import base_url
from router.problems import field_names, problems


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["part"]
    length: int = 0


class Other(Part):
    type: Literal["other"]  # type: ignore[assignment]


KIND = Annotated[
    Annotated[Part, Tag("(part)")] | Annotated[Other, Tag("(other)")], Discriminator(lambda _: "(part)")
]


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    part: Annotated[Part | Other, Field(discriminator="type")] | None = None
    parts: list[Part] = []
    kind: KIND | None = None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"prts": []}, "prts: unknown field (did you mean parts?)"),
        ({"weight": 1}, "weight: unknown field"),
        ({"part": {"type": "part", "lenght": 1}}, "part.lenght: unknown field (did you mean length?)"),
        ({"part": {"type": "other", "length": "x"}}, "part.length: Input should be a valid integer"),
        ({"kind": {"type": "part", "length": "x"}}, "kind.length: Input should be a valid integer"),
        ({"parts": [{"type": "part"}, {"type": "part", "length": "x"}]}, "parts.1.length: Input should be"),
        ({"part": 1}, "part: Input should be a valid dictionary"),
        ({"prts": 1, "weight": 2}, "prts: unknown field (did you mean parts?); weight: unknown field"),
    ],
)
def test_a_problem_has_the_place_that_a_person_wrote(value, said):
    with pytest.raises(ValidationError) as error:
        Whole.model_validate(value)
    assert problems(error.value, value, field_names(Whole)).startswith(said)


def test_the_fields_of_inner_models_are_known():
    assert field_names(Whole) == {"part", "parts", "kind", "type", "length"}


@pytest.mark.parametrize("address", ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"])
def test_a_base_url_has_no_version(address):
    assert base_url(address) == "http://a:1"


def test_a_base_url_keeps_its_path():
    assert base_url("http://a/models/v1") == "http://a/models"
    assert base_url("http://a/v11") == "http://a/v11"
