"""Tests: `tests/unit` mirrors the packages, `tests/integration` starts engines, `tests/helpers` is shared."""
