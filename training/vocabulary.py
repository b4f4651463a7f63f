"""One vocabulary for the whole pair: loads a recipe's pretrained tokenizer, and checks the models against it.

The checks run before any compute is spent.
"""

import json

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from measuring.json_lines import DataError
from router.rows import CheckpointError, VocabularyTensors
from router.vocabulary import OTHER_SPLIT, differences
from training.config import ChatConfig, Recipe, RecipeError
from training.hub import directory_of
from training.model_config import ROLES, PretrainedConfig, PrunedConfig, ServedConfig
from training.served import ServedTeacher, VLLMServer
from training.teacher_cache import TeacherCache
from training.tokenizer import TextTokenizer, rendered, visible_ids

PROBE = "Which way?"


def ready_tokenizer(name: str, chat: ChatConfig) -> PreTrainedTokenizerBase:
    """The pretrained tokenizer of a directory or hub name, with the recipe's chat template."""
    tokenizer = _load(name)
    tokenizer.chat_template = chat_template(tokenizer, chat)
    check_template(tokenizer, name)
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"the tokenizer of {name} has no end-of-sequence token")
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerBase, chat: ChatConfig) -> str:
    """The recipe's chat template, or else the tokenizer's own, with the recipe's options fixed in it.

    Raises:
        RecipeError: neither has a chat template.
    """
    template = chat.template or tokenizer.chat_template
    if not isinstance(template, str):
        raise RecipeError(f"{tokenizer.name_or_path} has no chat template: set chat.template")
    fixed = []
    for name, value in chat.options.items():
        fixed.append(f"{{%- set {name} = {json.dumps(value)} %}}")
    return "".join(fixed) + template


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises RecipeError if the chat template fails, or leaves the user's message out."""
    try:
        (text,) = rendered(tokenizer, [PROBE])
    except DataError as error:
        raise RecipeError(f"{name}: {error}") from error
    if PROBE.lower() not in text.lower():
        raise RecipeError(f"{name}: the chat template leaves the user's message out")


def check_pair(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check vocabularies and reserved rows of the models, before they are loaded.

    Raises:
        RecipeError: student or teacher has a different vocabulary from `tokenizer`, or the student has no
            rows for a router and cannot get them.
        ServerError: a served teacher cannot be used.
    """
    for name, further in recipe.cheaper:
        if isinstance(further, ServedConfig):
            served_teacher(further, of=name).check_vocabulary(tokenizer)
        else:
            check_vocabulary(f"teacher {name},", further.pretrained, tokenizer)
    for role in ROLES:
        config = recipe.model(role)
        if isinstance(config, ServedConfig):
            served_teacher(config).check_vocabulary(tokenizer)
        elif isinstance(config, PretrainedConfig):
            if config.pretrained != recipe.ready_tokenizer:  # that one has given `tokenizer` itself
                check_vocabulary(role, config.pretrained, tokenizer)
            if role == "student" or isinstance(recipe.student, PrunedConfig):
                check_rows(config.pretrained, visible_ids(tokenizer))


def check_rows(student: str, known: int) -> None:
    """Raises RecipeError if the student has no rows for a router, and cannot get them when it is served.

    Args:
        student: directory or hub name.
        known: number of ids that the tokenizer uses.
    """
    directory = directory_of(student)
    rows = AutoConfig.from_pretrained(directory).get_text_config().vocab_size
    if rows > known:
        return
    if not any(directory.glob("*.safetensors")):
        return  # the export will have safetensors, and they can grow
    try:
        VocabularyTensors.of(directory).check_growth(directory)
    except CheckpointError as error:
        raise RecipeError(f"student {student}: {error}") from error


def check_vocabulary(role: str, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RecipeError, with the first difference, if a model's ids are not those of `tokenizer`."""
    found = differences(TextTokenizer(tokenizer), TextTokenizer(_load(name)))
    if found.ids:
        raise RecipeError(
            f"the {role} {name} has a different vocabulary from {tokenizer.name_or_path}: "
            f"{found.ids}; a pair needs the same vocabulary"
        )
    if found.texts:
        print(f"the {role} {name} {OTHER_SPLIT}: {found.texts}")


def served_teacher(
    config: ServedConfig, cache: TeacherCache | None = None, of: str = "teacher"
) -> ServedTeacher:
    """The teacher behind a URL.

    Args:
        config: its address and its name at the server.
        cache: keeps its log-probabilities of demonstrations; None: they are not kept.
        of: its name in messages.
    """
    server = VLLMServer(of, config.url, config.model)
    return ServedTeacher(server, config.top_logprobs, cache, config.known_as)


def _load(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory_of(name))
    except (OSError, ValueError) as error:
        raise RecipeError(f"no tokenizer in {name}: {error}") from error
    tokenizer.name_or_path = name  # for messages
    return tokenizer
