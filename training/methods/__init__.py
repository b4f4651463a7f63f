"""Training methods by `type`, one small file each."""

from training.methods.base import Method
from training.methods.gkd import GKD
from training.methods.joint import Joint
from training.methods.kd import KD
from training.methods.pcl import PCL
from training.methods.seqkd import SeqKD
from training.methods.sft import SFT

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "seqkd": SeqKD,
    "kd": KD,
    "gkd": GKD,
    "pcl": PCL,
    "joint": Joint,
}

__all__ = ["METHODS", "Joint", "Method", "SeqKD"]
