"""Tiny models of many families, randomly initialised, without a spare row in their vocabulary."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.reserved import ReservedRows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from router.checkpoint import RouterCheckpoint

ORIGINAL = "original"
MERGED = "merged"
LOGITS = "logits.safetensors"
"""File in which `family_worker` leaves the logits of a family."""
ROWS = 96
APPENDED = ReservedRows(ROWS)
HIDDEN = 64
USUAL: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # on a CPU vLLM has no kernels for smaller heads
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ALL_HEADS = USUAL | {"num_key_value_heads": 2}
OLDER = {"vocab_size": ROWS, "bos_token_id": 1, "eos_token_id": 1}
GPT2 = OLDER | {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 128}
GEMMA = USUAL | {"sliding_window": 4, "query_pre_attn_scalar": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BLOOM = OLDER | {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 2}
FALCON = OLDER | {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", USUAL),
    "Llama, tied": ("LlamaConfig", USUAL | {"tie_word_embeddings": True}),
    "Mistral": ("MistralConfig", USUAL | {"sliding_window": 4}),
    "Qwen2": ("Qwen2Config", USUAL),
    "Qwen3": ("Qwen3Config", USUAL | {"tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3MoeConfig", USUAL | EXPERTS),
    "Gemma 2": ("Gemma2Config", GEMMA | {"final_logit_softcapping": 1.5}),
    "Gemma 3": ("Gemma3TextConfig", GEMMA),
    "Gemma 3, text and images": ("Gemma3Config", {"text_config": GEMMA, "vision_config": VISION}),
    "Phi": ("PhiConfig", ALL_HEADS),
    "Phi-3": ("Phi3Config", USUAL),
    "GPT-2": ("GPT2Config", GPT2),
    "GPT-J": ("GPTJConfig", GPT2 | {"rotary_dim": 16}),
    "GPT-NeoX": ("GPTNeoXConfig", ALL_HEADS),
    "OPT": ("OPTConfig", ALL_HEADS | {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN}),
    "Falcon": ("FalconConfig", FALCON),
    "BLOOM": ("BloomConfig", BLOOM),
    "OLMo 2": ("Olmo2Config", ALL_HEADS),
    "Granite": ("GraniteConfig", USUAL | {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "Cohere": ("CohereConfig", USUAL | {"logit_scale": 0.0625}),
    "StarCoder 2": ("Starcoder2Config", USUAL),
    "SmolLM 3": ("SmolLM3Config", USUAL),
    "GLM-4": ("Glm4Config", USUAL),
    "EXAONE 4": ("Exaone4Config", USUAL),
}
"""Name, class of the configuration in transformers, and the configuration's arguments of each family."""
NOT_IN_VLLM = (
    "Gemma 3, text and images",  # vLLM's class needs torchvision, which its CPU build lacks
)
"""Families for which the tests start no engine."""
IN_VLLM = [family for family in FAMILIES if family not in NOT_IN_VLLM]


def config_of(family: str) -> "PreTrainedConfig":
    import transformers

    name, settings = FAMILIES[family]
    return getattr(transformers, name)(**settings)


def model_of(family: str) -> "PreTrainedModel":
    """A random model of a family. With its large weights logits differ, and its biases are not zero."""
    import torch

    torch.manual_seed(0)
    model = _class_of(family).from_config(config_of(family)).eval().requires_grad_(False)
    for name, weights in model.named_parameters():
        if weights.ndim == 2:
            weights.mul_(4)
        elif name.endswith("bias"):
            weights.normal_(std=0.1)
    return model


def load(family: str, directory: Path) -> "PreTrainedModel":
    # Only eager attention caps its scores, which Gemma 2 needs.
    model = _class_of(family).from_pretrained(directory, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def write(family: str, directory: Path) -> Path:
    """Write the model's files, without a tokenizer."""
    model_of(family).save_pretrained(directory)
    return directory


def router_for(student: Path) -> "RouterCheckpoint":
    """A router for the student, with random taps."""
    import torch

    from router.checkpoint import Fingerprints, RouterCheckpoint, RouterConfig, fingerprint
    from router.gate import LearnedGate

    torch.manual_seed(1)
    config = RouterConfig(
        reserved_start=APPENDED.start,
        reserved_count=APPENDED.count,
        gate_width=8,
        span_tokens=4,
        expected_tokens=20.0,
        calibration={"learned": [(0.1, 4.0), (0.3, 2.0)]},
        fingerprints=Fingerprints(student=fingerprint(student, ROWS), tokenizer="0", teacher="0"),
    )
    taps = torch.randn(APPENDED.count - 1, HIDDEN)
    return RouterCheckpoint(config, taps, LearnedGate(APPENDED, 8).state_dict())


def _class_of(family: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    nested = "text_config" in FAMILIES[family][1]
    return AutoModelForImageTextToText if nested else AutoModelForCausalLM
