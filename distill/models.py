"""Models and tokenizers by name: a local folder, a hub id or a .gguf file becomes something that runs.

A tokenizer is checked when it is loaded, because transformers can rebuild one from its class name and silently lose
spaces, Chinese and emoji. A name that leads nowhere is one clear line, never a traceback or a long wait.

This module does not know `nano` (the command line turns it into a folder), does not build students (`students`) and
does not fetch or convert for keeping (`distill.fetch`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from distill.dtypes import torch_dtype
from distill.errors import UserError
from distill.hub import is_gguf, locate, one_line
from distill.identity import model_identity
from distill.quantisation import Bits, quantisation

__all__ = [
    "context_length",
    "end_token_ids",
    "fingerprint",
    "is_gguf",
    "load_model",
    "load_tokenizer",
    "locate",
    "model_identity",
]

log = logging.getLogger(__name__)

# Texts on which a rebuilt tokenizer betrays itself: spaces, runs of them before digits, scripts, emoji, accents in two
# code points, line ends. Compared without special tokens, since a config may rightly say whether BOS is added.
PROBES = (
    "Hello, 数学 x = 3",
    "  two\n\n three\t😀",
    "12345 + 678 = 13023\n\n1. a  2",
    "cafe\u0301 don't I'LL",
    " <think>\n\\boxed{½}</think>\n",
)


def load_tokenizer(model: str, *, chat_template: Path | None = None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model, checked against the tokenizer.json it was read from.

    A tokenizer without a padding token gets its end token for padding, in the object only: batching needs one, and
    padded positions are masked everywhere.

    Args:
        model: a local folder, a hub id or a .gguf file.
        chat_template: a Jinja file used where the model has no chat template of its own.

    Returns:
        A transformers tokenizer.

    Raises:
        UserError: no such model, no tokenizer in it, a broken one, or an unreadable template file.
    """
    path = locate(model, trust_remote_code=trust_remote_code)
    if path.is_file():
        from distill.gguf_files import load_gguf_tokenizer

        tokenizer = load_gguf_tokenizer(path)
    else:
        tokenizer = _folder_tokenizer(path, model, trust_remote_code)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        try:
            text = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat template {chat_template}: {one_line(error)}") from error
        if tokenizer.chat_template and tokenizer.chat_template != text:
            log.warning("%s has a chat template of its own; %s is not used", model, chat_template)
        else:
            tokenizer.chat_template = text
    return tokenizer


def _folder_tokenizer(folder: Path, model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names) and not list(folder.glob("*.tiktoken")):
        raise UserError(f"no tokenizer in {model}: a model folder needs tokenizer.json beside its config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a broken file makes the loaders raise, the tokenizer cannot be read
        raise UserError(f"cannot load the tokenizer of {model}: {one_line(error)}") from error
    file = folder / "tokenizer.json"
    wrong = _disagreement(tokenizer, file) if file.is_file() else None
    if wrong is None:
        return tokenizer
    log.warning(
        "transformers rebuilt the tokenizer of %s as %s, which reads %r differently from its tokenizer.json; "
        "tokenizer.json is used",
        model,
        type(tokenizer).__name__,
        wrong,
    )
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    wrong = _disagreement(plain, file)
    if wrong is not None:
        raise UserError(f"the tokenizer of {model} reads {wrong!r} differently from its own tokenizer.json")
    return plain


def _disagreement(tokenizer: Any, file: Path) -> str | None:
    """Return the first probe that `tokenizer` encodes or decodes differently from tokenizer.json, or None."""
    from tokenizers import Tokenizer

    try:
        reference = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file} is not a tokenizer: {one_line(error)}") from error
    for probe in PROBES:
        ids = tokenizer.encode(probe, add_special_tokens=False)
        if ids != reference.encode(probe, add_special_tokens=False).ids:
            return probe
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != reference.decode(ids):
            return probe
    return None


def load_model(
    model: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    quantization: Bits | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return a causal language model, its weights held in `dtype`.

    Args:
        model: a local folder, a hub id or a .gguf file (dequantised into plain weights).
        dtype: float32, bfloat16 or float16.
        device: where it goes: `cuda:1`, or `auto` to be spread over all devices; default: the CPU.
        quantization: hold the linear layers' weights in this many bits instead.

    Returns:
        A transformers PreTrainedModel in evaluation mode.

    Raises:
        UserError: no such model, unknown architecture, missing or corrupt weights, no such device.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it reports every tensor of every load; our own progress speaks of the work

    wanted = torch_dtype(dtype)
    path = locate(model, weights=True, trust_remote_code=trust_remote_code)
    if path.is_file():
        from distill.gguf_files import load_gguf_model

        if quantization or device:
            raise UserError(f"{model} is loaded whole on the CPU: make it a folder with distill fetch-model first")
        return load_gguf_model(path, dtype=dtype)
    if not (path / "config.json").is_file():
        raise UserError(f"{model} is no model folder: it has no config.json")
    further: dict[str, Any] = {"device_map": device} if device else {}
    if quantization:
        further["quantization_config"] = quantisation(quantization, dtype)
    try:
        loaded_and_report: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, trust_remote_code=trust_remote_code, output_loading_info=True, **further
        )
    except Exception as error:  # the loaders raise anything on broken files: Safetensor, Unpickling, Value, Key...
        raise UserError(f"cannot load the model {model}: {one_line(error)}") from error
    loaded, report = loaded_and_report
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers there
        raise UserError(f"the weights of {model} lack {len(missing)} tensors its config asks for, e.g. {missing[0]}")
    return loaded


def fingerprint(tokenizer: Any) -> str:
    """Return 16 hex digits that two tokenizers share when they turn every text into the same ids and back.

    Covers vocabulary, merges, normaliser, pre-tokeniser, post-processor, decoder and the added tokens; not padding,
    truncation, chat template, or which token is called end or padding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python: its class stands for its rules
        state: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        state = _rules(backend)
    text = json.dumps(state, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rules(backend: Any) -> dict[str, Any]:
    """Return a fast tokenizer's rules without what has no effect on ids or text."""
    state: dict[str, Any] = json.loads(backend.to_str())
    for transient in ("version", "truncation", "padding"):
        state.pop(transient, None)
    if isinstance(state["model"]["vocab"], dict):  # an added token may or may not be listed there, to the same effect
        state["model"]["vocab"] = backend.get_vocab()
    state["added_tokens"] = sorted(state["added_tokens"], key=lambda token: token["id"])
    # Offsets aside, a byte-level decoder has no settings, and these post-processors do nothing.
    if (state["decoder"] or {}).get("type") == "ByteLevel":
        state["decoder"] = {"type": "ByteLevel"}
    after = state["post_processor"] or {}
    if after.get("type") == "ByteLevel" or (after.get("type") == "TemplateProcessing" and not after["special_tokens"]):
        state["post_processor"] = None
    before = state["pre_tokenizer"] or {}
    for stage in before.get("pretokenizers", [before]):
        stage.pop("trim_offsets", None)
    return state


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every token id that ends a completion, sorted.

    These are the generation config's end tokens, the tokenizer's, and the token the chat template writes after an
    assistant's turn (`<|im_end|>` in a model whose end token is still its base model's).

    Args:
        model: a model, a generation config, or a model config: whatever carries `eos_token_id`.

    Raises:
        UserError: the chat template cannot be rendered.
    """
    config = getattr(model, "generation_config", None) or model
    given = getattr(config, "eos_token_id", None)
    ids = set(given if isinstance(given, (list, tuple)) else [] if given is None else [given])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    turn = _end_of_turn_id(tokenizer)
    if turn is not None:
        ids.add(turn)
    return sorted(int(i) for i in ids)


def _end_of_turn_id(tokenizer: Any) -> int | None:
    if not tokenizer.chat_template:
        return None
    mark = "qwertz"  # any word without special meaning
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise UserError(f"the chat template cannot be rendered: {one_line(error)}") from error
    added = tokenizer.added_tokens_decoder
    after = tokenizer.encode(text.rpartition(mark)[2], add_special_tokens=False)
    return next((i for i in after if i in added), None)


def context_length(config: Any) -> int | None:
    """Return how many tokens a model's positions reach, from its config; None when it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text, "max_position_embeddings", None)
    return int(value) if value else None
