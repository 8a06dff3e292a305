"""GGUF files as plain models: dequantised weights, and the tokenizer stages that the format does not carry.

A GGUF file names its pre-tokeniser (`tokenizer.ggml.pre`) instead of describing it, and fills its vocabulary up to the
number of logits. transformers rebuilds a tokenizer from that which can miss a stage (SmolLM2's separate digits, Qwen's
Unicode normalisation), so `REPAIRS` puts the stages of the original tokenizers back.

Not here: running quantised weights as they are. What is lost to quantisation stays lost.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.dtypes import torch_dtype
from distill.errors import UserError
from distill.hub import one_line, require_gguf

log = logging.getLogger(__name__)

_UNUSED = 5  # GGUF's token type of rows that stand for no token

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_SMOLLM_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

# `tokenizer.ggml.pre` -> what replaces or changes the rebuilt tokenizer's stages, after the original tokenizer.json:
# `not_special` are added tokens that decoding keeps; `no_bos` drops a BOS that the original does not have; `ends` are
# tokens that end a completion beside the file's one.
REPAIRS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "post_processor": _BYTES,
        "decoder": _BYTES,
        "byte_stage": _BYTES,
        "not_special": [
            "<|fim_prefix|>",
            "<|fim_middle|>",
            "<|fim_suffix|>",
            "<|fim_pad|>",
            "<|repo_name|>",
            "<|file_sep|>",
        ],
        "no_bos": True,
        "ends": ["<|endoftext|>", "<|im_end|>"],
    },
    "smollm": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _SMOLLM_BYTES],
        },
    },
}
# Pre-tokenisers that transformers rebuilds completely (its own split expressions, or byte-level BPE as GPT-2's).
COMPLETE = ("llama-bpe", "llama3", "llama-v3", "gpt-2", "tekken", "default")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file that conversion needs.

    Returns:
        `pre` (pre-tokeniser name or None), `kind` (tokenizer model), `token_types` (list of int, one per row),
        `end_ids` (ids that end a turn), `add_bos` (bool or None), `quantisation` (names of the tensor types).

    Raises:
        UserError: not a GGUF file, or the gguf extra is missing.
    """
    require_gguf(str(path))
    from gguf import GGUFReader, LlamaFileType

    try:
        reader = GGUFReader(str(path))
    except Exception as error:  # the reader raises anything on a truncated file
        raise UserError(f"{path} is not a readable GGUF file: {one_line(error)}") from error

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    ends = [value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    file_type = value("general.file_type")
    names = {member.value: member.name.removeprefix("MOSTLY_") for member in LlamaFileType}
    return {
        "pre": value("tokenizer.ggml.pre"),
        "kind": value("tokenizer.ggml.model"),
        "token_types": value("tokenizer.ggml.token_type") or [],
        "end_ids": [int(i) for i in ends if i is not None],
        "add_bos": value("tokenizer.ggml.add_bos_token"),
        "quantisation": names.get(file_type, "unknown"),
    }


def load_gguf_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a GGUF file with the stages restored that the file only names.

    Rows that stand for no token (`[PAD151665]`) are left out, so that its length is the number of tokens.

    Raises:
        UserError: not a GGUF file, or one without a tokenizer.
    """
    from transformers import AutoTokenizer

    metadata = read_metadata(path)
    if metadata["kind"] is None:
        raise UserError(f"no tokenizer in {path}")
    try:
        rebuilt = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # unknown tokenizer kinds, broken metadata
        raise UserError(f"cannot rebuild the tokenizer of {path}: {one_line(error)}") from error
    if metadata["kind"] == "gpt2" and metadata["pre"] not in (*REPAIRS, *COMPLETE):
        log.warning("%s names the pre-tokeniser %r, which may be rebuilt incompletely", path, metadata["pre"])
    return _repaired(rebuilt, REPAIRS.get(metadata["pre"] or "", {}), metadata["token_types"])


def _repaired(rebuilt: Any, repair: Mapping[str, Any], token_types: list[int]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(rebuilt.backend_tokenizer.to_str())
    for stage in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if stage in repair:
            state[stage] = repair[stage]
    if "byte_stage" in repair:
        state["pre_tokenizer"]["pretokenizers"][-1] = repair["byte_stage"]
    if isinstance(state["model"]["vocab"], dict):
        tokens = len(token_types)
        while tokens and token_types[tokens - 1] == _UNUSED:
            tokens -= 1
        if tokens:
            state["model"]["vocab"] = {t: i for t, i in state["model"]["vocab"].items() if i < tokens}
            state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < tokens]
    for token in state["added_tokens"]:
        if token["content"] in repair.get("not_special", ()):
            token["special"] = False
    named = {name: getattr(rebuilt, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if repair.get("no_bos"):
        named["bos_token"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=rebuilt.chat_template,
        clean_up_tokenization_spaces=False,
        **named,
    )


def load_gguf_model(path: Path, *, dtype: str = "float32") -> Any:
    """Return the model of a GGUF file with every weight dequantised to `dtype`, as plain as one never quantised.

    Raises:
        UserError: not a GGUF file, an architecture transformers cannot read, or broken weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    require_gguf(str(path))
    wanted = torch_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=wanted)
    except Exception as error:  # unknown architectures, truncated tensors
        raise UserError(f"cannot read the weights of {path}: {one_line(error)}") from error
    _check_shapes(model, path)
    # transformers keeps calling the model quantised, and then refuses to save or train it.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.to(wanted)


def _check_shapes(model: Any, path: Path) -> None:
    """Raise UserError where the config read from the file does not describe the weights read from it."""
    import torch

    with torch.device("meta"):
        described = type(model)(model.config).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in described or described[name].shape != tensor.shape:
            wanted = tuple(described[name].shape) if name in described else "absent"
            raise UserError(
                f"transformers reads {path} wrongly: {name} is {tuple(tensor.shape)}, its configuration says {wanted}"
            )
