"""Training methods by `type`, one small file each."""

from training.methods.base import Method
from training.methods.kd import KD
from training.methods.sft import SFT

METHODS: dict[str, type[Method]] = {"sft": SFT, "kd": KD}

__all__ = ["METHODS", "Method"]
