"""A tokenizer whose ids are bytes and a tiny router, which several unit tests share."""

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from router.checkpoint import Fingerprints, RouterCheckpoint, RouterConfig, TeacherOutput, new_gate
from router.gate import LearnedGate
from router.reserved import ReservedRows

EOS = 256
HIDDEN = 4


def _byte_characters() -> list[str]:
    """The character with which a byte-level tokenizer writes each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: the ids of a text are its UTF-8 bytes, and 256 is the end of sequence."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    fast = Tokenizer(models.BPE(vocabulary | {"<eos>": EOS}, merges=[]))
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>")


def tiny_router(reserved: ReservedRows) -> RouterCheckpoint:
    """A router whose gate scores a position by its first tap alone: score = logit of row 11."""
    return RouterCheckpoint(
        config=RouterConfig(
            reserved_start=reserved.start,
            reserved_count=reserved.count,
            gate_width=2,
            span_tokens=4,
            expected_tokens=20.0,
            calibration={"learned": [(0.1, 4.0), (0.3, 2.0)]},
            fingerprints=Fingerprints(student="0" * 64, tokenizer="1" * 64, teacher="big"),
        ),
        taps=torch.arange(3 * HIDDEN, dtype=torch.float32).reshape(3, HIDDEN),
        gate=_reading_taps(LearnedGate(reserved, width=2)).state_dict(),
    )


def tiny_router_of_two(reserved: ReservedRows) -> RouterCheckpoint:
    """A router for two teachers: small is worth the logit of row 11, big (twice as dear) that of row 12."""
    one = tiny_router(reserved)
    teachers = (
        TeacherOutput(name="small", cost=0.5, calibration=[(0.1, 1.5), (0.3, 0.5)]),
        TeacherOutput(name="big", cost=1.0, calibration=[(0.1, 5.0), (0.3, 3.0)]),
    )
    gate = _reading_taps(new_gate(reserved, 4, [0.5, 1.0]))
    config = one.config.model_copy(update={"gate_width": 4, "teachers": teachers})
    return RouterCheckpoint(config, one.taps, gate.state_dict())


def _reading_taps(gate: LearnedGate) -> LearnedGate:
    """Make each output a tap: silu(x) - silu(-x) = x, so two units carry a number through a layer."""
    for parameter in gate.parameters():
        parameter.data.zero_()
    first, second, last = gate.mlp[0], gate.mlp[2], gate.mlp[4]
    for output in range(len(last.weight)):
        units = slice(2 * output, 2 * output + 2)
        first.weight.data[units, output] = torch.tensor([1.0, -1.0])
        second.weight.data[units, units] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        last.weight.data[output, units] = torch.tensor([1.0, -1.0])
    return gate
