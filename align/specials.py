"""Which special tokens of two tokenizers mean the same, by what they do: stop, start, padding, unknown, reasoning.

Spelling alone says little: `<|endoftext|>` pads Qwen2.5 and is the unknown token of SmolLM2, and `<|im_start|>` is
SmolLM2's BOS. So special tokens are paired by role; of those without any, the ones with the same spelling are paired.
A mark of reasoning (`<think>`) stands for text: its bytes align it, with the other side's single token or its several.

Pure data: tokenizers and configs are read, no text is aligned here, and nothing knows logits.
"""

from __future__ import annotations

from typing import Any

from align.byte_view import REASONING_MARKS, byte_view
from distill.errors import UserError
from distill.models import end_token_ids

ROLES = ("stop", "bos", "pad", "unk", "think_open", "think_close")


def stop_ids(tokenizer: Any, config: Any = None) -> tuple[int, ...]:
    """Return every token id that ends a completion: the tokenizer's eos first if it has one, the others rising.

    Args:
        config: a generation config, a model config or a model, which may name further end tokens.

    Raises:
        UserError: there is none, an id that the tokenizer does not have, or a chat template that cannot be rendered.
    """
    ids = end_token_ids(config, tokenizer)
    if not ids:
        raise UserError("nothing ends a completion: the tokenizer has no eos token, and no config names one")
    size = len(byte_view(tokenizer))
    beyond = [index for index in ids if not 0 <= index < size]
    if beyond:
        raise UserError(f"the model's config ends completions with token {beyond[0]}: the tokenizer has only {size}")
    return tuple(sorted(ids, key=lambda index: (index != tokenizer.eos_token_id, index)))


def roles(tokenizer: Any, config: Any = None) -> dict[str, tuple[int, ...]]:
    """Return the token ids that play each role of `ROLES`, () for none; an id plays the first of its roles only.

    So a padding token that is also an end token is an end token. A mark of reasoning is there where it is one token.

    Args:
        config: what may name further end tokens, as in `stop_ids`.
    """
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    single = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, *map(added.get, REASONING_MARKS)]
    found = {"stop": stop_ids(tokenizer, config)}
    taken = set(found["stop"])
    for role, index in zip(ROLES[1:], single, strict=True):
        found[role] = () if index is None or index in taken else (index,)
        taken.update(found[role])
    return found


def special_pairs(
    student: Any, teacher: Any, *, student_config: Any = None, teacher_config: Any = None
) -> dict[int, int]:
    """Return student id -> teacher id of the special tokens that mean the same, one to one.

    Of several stop tokens those with the same spelling are paired, then the others in the order of `stop_ids`; one
    that is left over has no partner, so whoever compares probabilities pools all of them. Tokens that stand for text
    on both sides (`<think>`) are left out where their bytes pair them anyway.

    Args:
        student, teacher: transformers tokenizers.
        student_config, teacher_config: what may name further end tokens, as in `stop_ids`.

    Raises:
        UserError: as `stop_ids`, for either side.
    """
    sides = (student, roles(student, student_config)), (teacher, roles(teacher, teacher_config))
    pairs: dict[int, int] = {}
    for role in ROLES:
        own, other = ({_spelling(side, index): index for index in played[role]} for side, played in sides)
        alike = [spelling for spelling in own if spelling in other]
        pairs |= {own.pop(spelling): other.pop(spelling) for spelling in alike}
        pairs |= dict(zip(own.values(), other.values(), strict=False))
    own, other = (_without_role(side, played) for side, played in sides)
    pairs |= {index: other[spelling] for spelling, index in own.items() if spelling in other}
    texts = byte_view(student).tokens, byte_view(teacher).tokens
    return {a: b for a, b in pairs.items() if texts[0][a] is None or texts[0][a] != texts[1][b]}


def _spelling(tokenizer: Any, index: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(index))


def _without_role(tokenizer: Any, played: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Return spelling -> id of the special tokens that play no role."""
    taken = {index for ids in played.values() for index in ids}
    return {spelling: index for index, spelling in byte_view(tokenizer).special.items() if index not in taken}
