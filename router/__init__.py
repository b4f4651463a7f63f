"""Decisions: when the student asks the teacher, at what price, within which budget.

Imports torch where a gate is computed, and neither vLLM nor FastAPI anywhere, so that the
training package and the gateway share one definition of every decision.
"""
