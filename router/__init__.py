"""Decisions: when the student asks the teacher, at what price, within which budget.

This package imports torch for its gates, but neither vLLM nor FastAPI. So training and the gateway share
one definition of every decision.
"""
