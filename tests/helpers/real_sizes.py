"""Computed memory and hours of the recipe `hf-pair` on one card: `python -m tests.helpers.real_sizes`.

The engines' times are those of `server.bench.roofline` on an H100. The trainer's come from its FLOPs, and
from assumptions about transformers, which writes the student's own completions token by token.
"""

from typing import NamedTuple

from server.bench.cost_model import Traffic
from server.bench.gpu_model import H100, QWEN_06, QWEN_8
from server.bench.roofline import DecoderShape, Load, cooperation
from training.cli import find_recipe
from training.config import load_recipe
from training.gating.served_calibration import passes_of
from training.gating.traffic_stage import POSITIONS
from training.method_config import GKDConfig
from training.model_config import LoraConfig, PretrainedConfig
from training.pieces import PIECE
from training.started_servers import READ_AT_ONCE

PROMPT = 500
"""Tokens of a prompt, assumed."""
FLOAT, HALF = 4, 2
TRAINED = 0.4 * 989e12
"""FLOPs a second of training passes in bf16: 0.4 of the peak, assumed."""
FULL = 0.4 * 67e12
"""FLOPs a second of training passes in float32: 0.4 of the peak, assumed."""
EAGER_STEP = 30e-3
"""Seconds in which transformers writes a token for all rows, assumed: 28 layers, bound by launches."""
ACTIVATIONS = 34
"""Bytes of a layer's activations, per token and unit of width (Korthikanti et al. 2022, arXiv 2205.05198)."""
READOUTS = 1
"""How often all positions are multiplied by the output matrix for the gate's features."""
LOSS_COPIES = 8
"""Number of tensors as large as a piece of logits in a loss, see `training.pieces`."""
WORKSPACE = 4e9
"""Bytes of CUDA itself and lost by allocators, in three processes; assumed."""
TEACHER_SHARE, STUDENT_SHARE = 0.35, 0.15
"""Shares of the card for the two engines of the evaluation (vLLM's --gpu-memory-utilization)."""
CACHE = 4 * 2**30
"""Bytes of keys and values in an engine that the router's stage starts, see `training.started_servers`."""
SCORES = 3 * int(READ_AT_ONCE) * QWEN_8.vocabulary * FLOAT
"""Bytes of logits and log-probabilities in a step of the teacher's engine, with 3 tensors (assumed)."""
CARD = 80e9


class Stage(NamedTuple):
    """The memory and time of a stage."""

    name: str
    parts: dict[str, float]
    """Bytes on the card, by part."""
    seconds: dict[str, float]

    @property
    def memory(self) -> float:
        """Bytes on the card."""
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        """Hours of the whole stage."""
        return sum(self.seconds.values()) / 3600


def weights(shape: DecoderShape) -> int:
    """Number of the model's weights, without norms."""
    return shape.layer_weights + shape.matrix * (1 if shape.tied else 2)


def adapters(shape: DecoderShape, rank: int) -> int:
    """Number of weights in the adapters of all linear layers."""
    attention = 2 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_size + 2 * shape.hidden
    feed_forward = 3 * (shape.hidden + shape.feed_forward)
    return shape.layers * rank * (attention + feed_forward)


def student_stage() -> Stage:
    """Distillation with adapters; the teacher reads in the same process."""
    recipe = load_recipe(find_recipe("hf-pair"))
    student = recipe.student
    assert isinstance(student, PretrainedConfig)
    assert student.schedule is not None
    assert isinstance(student.method, GKDConfig)
    assert isinstance(student.lora, LoraConfig)
    schedule = student.schedule
    row = PROMPT + recipe.max_tokens
    part = schedule.batch // schedule.accumulate * row
    tokens = schedule.batch * row
    trained = adapters(QWEN_06, student.lora.rank)
    cache = 2 * QWEN_06.layers * QWEN_06.kv_heads * QWEN_06.head_size * FLOAT
    flops = 4 * (QWEN_06.layer_weights + QWEN_06.matrix) + 2 * (QWEN_8.layer_weights + QWEN_8.matrix)
    return Stage(
        "student",
        {
            "teacher": weights(QWEN_8) * HALF,
            "student": weights(QWEN_06) * FLOAT,
            "adapters, gradients, optimizer": trained * 4 * FLOAT,
            "activations": ACTIVATIONS * QWEN_06.layers * QWEN_06.hidden * part,
            "pieces of logits": LOSS_COPIES * PIECE * FLOAT,
            "caches of own completions": schedule.batch * row * cache,
            "workspace": WORKSPACE,
        },
        {
            "passes": schedule.steps * tokens * flops / TRAINED,
            "own completions": schedule.steps * student.method.on_policy * recipe.max_tokens * EAGER_STEP,
        },
    )


def router_stage() -> Stage:
    """Rounds, prices and the fit; both engines are on the same card."""
    recipe = load_recipe(find_recipe("hf-pair"))
    config = recipe.router
    written = recipe.max_tokens * config.prompts * config.rounds
    asked = recipe.max_tokens * config.calibration_examples * passes_of(len(config.budgets))
    read = config.prompts * config.rounds * (PROMPT + recipe.max_tokens)
    student = 2 * (QWEN_06.layer_weights + QWEN_06.matrix)
    teacher = 2 * (QWEN_8.layer_weights + QWEN_8.matrix)
    speed = served(config.ask_tokens, recipe.max_tokens)
    return Stage(
        "router",
        {
            "teacher's engine": weights(QWEN_8) * HALF + CACHE + SCORES,
            "gateway's engine": weights(QWEN_06) * HALF + CACHE,
            "student, which reads": weights(QWEN_06) * FLOAT,
            "its output matrix in the gate's head": QWEN_06.matrix * FLOAT,
            "pieces of logits": LOSS_COPIES * PIECE * FLOAT,
            "workspace": WORKSPACE,
        },
        {
            "rounds": written / speed,
            "both read": read * (teacher / TRAINED + student / FULL),
            "fits": READOUTS * 2 * POSITIONS * QWEN_06.matrix / FULL,
            "prices": asked / speed,
        },
    )


def evaluation() -> Stage:
    """Evaluation of 1,000 examples at seven budgets, through the gateway."""
    recipe = load_recipe(find_recipe("hf-pair"))
    tokens = 7 * 1000 * recipe.max_tokens
    engines = {"teacher's engine": TEACHER_SHARE * CARD, "gateway's engine": STUDENT_SHARE * CARD}
    speed = served(recipe.router.ask_tokens, recipe.max_tokens)
    return Stage("evaluation", engines | {"workspace": WORKSPACE}, {"completions": tokens / speed})


def served(call_tokens: int, completion: int) -> float:
    """Tokens a second of 16 requests at once at a teacher rate of .2, the mean of the budgets."""
    traffic = Traffic(prompt=PROMPT, completion=completion, rate=0.2, call_tokens=call_tokens)
    return cooperation(H100, QWEN_06.model(), QWEN_8.model(), Load(traffic, 16))


STAGES = (student_stage, router_stage, evaluation)


def table() -> str:
    """All stages as a table in Markdown."""
    lines = ["| stage | memory | of it | hours | of them |", "| --- | ---: | --- | ---: | --- |"]
    for stage in (make() for make in STAGES):
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in stage.parts.items())
        spent = ", ".join(f"{name} {seconds / 3600:.2f}" for name, seconds in stage.seconds.items())
        lines.append(
            f"| {stage.name} | {stage.memory / 1e9:.0f} GB | {parts} | {stage.hours:.1f} | {spent} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
