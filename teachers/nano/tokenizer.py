"""The nano tokenizer: lossless on any text, and one token for each word and number of the nano language.

Byte-level BPE without a single merge: a piece of text that is a whole entry of the vocabulary is one token, anything
else falls apart into its bytes. The pre-tokenizer ties spaces to words and never to numbers, so that a number from 0
to 49 has one id wherever it stands; with digits as tokens, or two ids for one number, the arithmetic was not learnt
in the minutes that the embedded teacher may take. What it does not do: compress text other than its own.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from teachers.nano.problems import ADDING, DAYS, ITEMS, LARGEST, NAMES, SCALING, TAKING

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
THINK = ("<think>", "</think>")
ROLES = ("system", "user", "assistant")
CONTEXT = 512  # tokens of the embedded models' context
# A role and its newline; \\boxed{; a comma and its space; a run of digits; a word with the space before it, and the
# one after it if a number follows. All other text stays between these and falls apart into bytes.
PIECES = rf"(?:{'|'.join(ROLES)})\n|\\boxed\{{|, |[0-9]+| ?[A-Za-z]+(?: (?=[0-9]))?"
# The comment tells the toolkit that this model reasons; nothing is prefilled.
CHAT_TEMPLATE = (
    "{# reasoning: <think> ... </think> #}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def words() -> list[str]:
    """Return the pieces of the nano language that are longer than one byte, with the spaces they carry."""
    counted = [f" {verb} " for verb in (*ADDING, *TAKING)]  # a number follows
    plain = [f" {word}" for word in (*SCALING, *ITEMS, *DAYS, "Total")]
    numbers = [str(number) for number in range(10, LARGEST + 1)]  # 0..9 are bytes
    roles = [f"{role}\n" for role in ROLES]
    return [*numbers, *NAMES, " has ", *counted, *plain, "Start ", ", ", "\\boxed{", *roles]


def vocabulary() -> dict[str, int]:
    """Return token -> id, in the byte-level alphabet; the size is a multiple of 64, the rest reserved."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [PAD, START, END, *THINK, *sorted(byte_level.alphabet())]
    for word in words():
        ((symbols, _),) = byte_level.pre_tokenize_str(word)
        tokens.append(symbols)
    tokens += [f"<|reserved_{index}|>" for index in range(-len(tokens) % 64)]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer, with its ChatML template; `save_pretrained` writes what AutoTokenizer and vLLM load."""
    vocab = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [token for token in vocab if token.startswith("<|reserved_")]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in reserved])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])  # kept when decoding
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
