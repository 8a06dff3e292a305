"""How a tokenizer spells bytes: what its stages say, as data, and what turns an entry of its vocabulary into bytes.

An entry is read as the tokenizer's own decoder reads it, stage by stage, without the stages that concern a text as a
whole. So two alphabets are known: byte-level tokenizers write each byte as one printable character (GPT-2's table);
sentencepiece ones write a space as `▁`, and the bytes they have no piece for as `<0xHH>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from tokenizers import Tokenizer, models

from distill.errors import UserError

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
OF_THE_WHOLE_TEXT = ("Fuse", "Strip")  # decoder stages that join tokens, or trim what was joined


@lru_cache(maxsize=1)
def byte_letters() -> tuple[str, ...]:
    """Return the character that byte-level tokenizers write for each of the 256 bytes (GPT-2's table).

    Printable Latin-1 stands for itself; the others are the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def stages_of(backend: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer's stages as data, with an empty model: the vocabulary is left out because it is large.

    Raises:
        UserError: a stage written in Python.
    """
    stages = Tokenizer(models.BPE())
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, name) is not None:
            setattr(stages, name, getattr(backend, name))
    try:
        rules: dict[str, Any] = json.loads(stages.to_str())
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"a tokenizer with a stage of one's own cannot be read as bytes: {error}") from error
    return rules


def openings(rules: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the stages of `rules` that put a space before a text, each with the settings under which it does not."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for stage in (*_flat(rules["normalizer"]), *_flat(rules["pre_tokenizer"])):
        if stage["type"] == "Prepend":
            found.append((stage, {"prepend": ""}))
        elif stage["type"] == "Metaspace" and stage["prepend_scheme"] != "never":
            found.append((stage, {"prepend_scheme": "never"}))
        elif stage["type"] == "ByteLevel" and stage.get("add_prefix_space"):
            found.append((stage, {"add_prefix_space": False}))
    return found


def reader_of(rules: dict[str, Any], name: str) -> tuple[str, Callable[[str], bytes]]:
    """Return a tokenizer's kind ("byte-level" or "sentencepiece"), and what turns an entry of its vocabulary to bytes.

    Args:
        rules: `stages_of` the tokenizer.
        name: what to call it in an error.

    Raises:
        UserError: its alphabet is not known.
    """
    stages = list(_flat(rules["decoder"])) or [
        stage for stage in _flat(rules["pre_tokenizer"]) if stage["type"] in ("ByteLevel", "Metaspace")
    ]
    types = [stage["type"] for stage in stages]
    if "ByteLevel" in types:
        return "byte-level", _byte_level
    swaps, unknown = [], not stages
    for stage in stages:
        if stage["type"] == "Metaspace":
            swaps.append((stage["replacement"], " "))
        elif stage["type"] == "Replace" and "String" in stage["pattern"]:
            swaps.append((stage["pattern"]["String"], stage["content"]))
        else:
            unknown |= stage["type"] not in ("ByteFallback", *OF_THE_WHOLE_TEXT)
    if unknown:
        raise UserError(
            f"{name} spells its tokens in an alphabet that is not known (decoder: {', '.join(types) or 'none'}): "
            "there are byte-level ones and sentencepiece ones"
        )
    return "sentencepiece", partial(_sentencepiece, swaps, "ByteFallback" in types)


def _flat(stage: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the stages that a stage consists of, in order."""
    if stage is None:
        return
    inner = next((stage[key] for key in ("normalizers", "pretokenizers", "decoders") if key in stage), None)
    if inner is None:
        yield stage
    else:
        for each in inner:
            yield from _flat(each)


def _sentencepiece(swaps: list[tuple[str, str]], byte_fallback: bool, spelling: str) -> bytes:
    if byte_fallback and (piece := BYTE_PIECE.match(spelling)):
        return bytes([int(piece[1], 16)])
    for old, new in swaps:
        spelling = spelling.replace(old, new)
    return spelling.encode()


def _byte_level(spelling: str) -> bytes:
    try:
        return spelling.translate(_alphabet()).encode("latin-1")
    except UnicodeEncodeError:  # an entry that no text is split into: the decoder prints it as it stands
        return spelling.encode()


@lru_cache(maxsize=1)
def _alphabet() -> dict[int, int]:
    """Return GPT-2's table, code point -> byte; Latin-1 characters that stand for no byte lead outside of Latin-1."""
    return dict.fromkeys(range(256), 0xFFFF) | {ord(letter): byte for byte, letter in enumerate(byte_letters())}
