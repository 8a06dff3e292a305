"""What the tests of alignments share: a vocabulary under other ids, a really different one, and models of both."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from conftest import CHATML, byte_tokenizer, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align import open_training
from align.engine.token_alignment import TokenAlignment

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# A teacher's template may say other things around the same words.
OTHER_TEMPLATE = (
    "<|im_start|>Be brief.\n{% for message in messages %}[{{ message.role }}] {{ message.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def answers(count: int = 12) -> list[list[dict[str, str]]]:
    """Conversations with reasoning, numbers of several digits, and indented lines."""
    thoughts = ["add them", "add them slowly:\n    first one, then the other", "sum  it"]
    return [
        [
            {"role": "user", "content": f"{i}+{i * 7}?"},
            {"role": "assistant", "content": f"<think>\n{thoughts[i % 3]}\n</think>\n\n\\boxed{{{i + i * 7}}} né 數"},
        ]
        for i in range(count)
    ]


def bpe(texts: Iterable[str], *, size: int = 330, template: str = CHATML) -> Any:
    """Return a byte-level BPE tokenizer trained on texts: its tokens are longer than bytes and span digits."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False, min_frequency=1
        ),
    )
    return _wrapped(core, template)


@lru_cache
def merged(template: str = CHATML) -> Any:
    """Return the tokenizer of `bpe` on the answers; do not change it."""
    return bpe([message["content"] for messages in answers() for message in messages], template=template)


def permuted(tokenizer: Any, model: Any = None, *, seed: int = 1) -> tuple[Any, Any]:
    """Return a tokenizer with other ids for the same tokens, and the model that it belongs to."""
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(seed))
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["vocab"] = {token: int(order[index]) for token, index in tokenizer.get_vocab().items()}
    for token in rules["added_tokens"]:
        token["id"] = int(order[token["id"]])
    rules["added_tokens"].sort(key=lambda token: token["id"])
    moved = _wrapped(Tokenizer.from_str(json.dumps(rules)), tokenizer.chat_template)
    if model is None:
        return moved, None
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("get_input_embeddings", "get_output_embeddings"):
            getattr(other, name)().weight[order] = getattr(model, name)().weight[: len(tokenizer)]
    return moved, other


def pair_of_models(*, teacher_template: str = OTHER_TEMPLATE) -> tuple[Any, Any, Any, Any]:
    """Return a student, its byte tokenizer, and a teacher with longer tokens and another template."""
    theirs = merged(teacher_template)
    teacher = tiny_model(seed=9, hidden_size=48, vocab_size=len(theirs) + 6)
    return tiny_model(seed=0), byte_tokenizer(), teacher, theirs


def aligned(name: str, student_tokenizer: Any, teacher_tokenizer: Any) -> TokenAlignment:
    """Return an alignment that is not the identity."""
    alignment = open_training(name, student_tokenizer, teacher_tokenizer)
    assert alignment is not None
    return alignment


def rows(conversations: Sequence[Any]) -> str:
    """Return conversations as lines of a .jsonl file."""
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)


def _wrapped(core: Tokenizer, template: str | None) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer
