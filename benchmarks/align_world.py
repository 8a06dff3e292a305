"""A world in which methods of distilling across vocabularies can be told apart: two tokenizers, a text whose true
probabilities are known, two teachers that have learnt them, and two students that have not.

    Ana has 195 books. Mon sells 104. Total?
    <think>Start is 195. And thereafter, 195-104=91. Shelf 41, row 9, all told.</think>\\boxed{91}

A nano problem of one operation with quantities of at most 19, every one times 43, so that most numbers have three
digits. What the arithmetic does not decide, a `Writer` draws, from tables of known probabilities: how a trace opens
depends on the name, how it leads on on the verb, its closing and the shelf on the item, the row on the shelf. Shelves
and rows are numbers that share first digits (4, 41, 417). A trace shows one draw of each, a teacher knows the
probabilities: so soft labels can say more than hard ones here, unlike in the nano problems themselves, and how much of
it arrives across vocabularies can be measured.

The two vocabularies differ in what real ones differ in. `digits`: one digit a token, ChatML, `<think>` one token, as
Qwen has it. `merged`: up to three digits a token, another split of words and of punctuation, merges learnt from another
text, another template and other special tokens, `<think>` plain text, as Llama-3 has it. Everything is a function of
the seeds below. What is here knows nothing of the methods compared.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teachers.nano.problems import DAYS, ITEMS, NAMES, VERBS, Problem, stream

SCALE, TOP = 43, 19  # quantities are 0..19 times 43: 17 of the 20 have three digits
LEVEL = 1
OPENINGS = ("Start with", "Starting at", "Start is", "Begin with", "Beginning at", "At first", "First come")
OPENINGS += ("There were", "There are", "Here are")
LEADS = ("then", "thereafter", "there", "that day", "today", "to go on", "next", "now", "nowadays", "so", "soon")
LEADS += ("some day",)
CLOSINGS = ("done", "do check", "all done", "all right", "alright", "all told", "answer", "and so", "so", "in all")
CODES = ("4", "41", "417", "412", "473", "40", "92", "93", "930", "935", "9", "86", "861", "5", "508", "58")


# -- the text


class Writer:
    """One who writes solutions: the probabilities of every choice, drawn once from a seed.

    A choice depends on one thing; the logits of its outcomes are normal, of standard deviation `spread`.
    """

    def __init__(self, seed: int, *, spread: float = 1.7) -> None:
        rng = np.random.default_rng(seed)

        def table(contexts: int, outcomes: int) -> np.ndarray:
            chances = np.exp(spread * rng.normal(size=(contexts, outcomes)))
            return chances / chances.sum(-1, keepdims=True)

        self.openings = table(len(NAMES), len(OPENINGS))
        self.leads = table(len(VERBS), len(LEADS))
        self.shelves = table(len(ITEMS), len(CODES))
        self.rows = table(len(CODES), len(CODES))
        self.closings = table(len(ITEMS), len(CLOSINGS))

    def write(self, problem: Problem, rng: random.Random) -> tuple[str, float]:
        """Return a worked solution, and how many nats it takes to tell it from all others of the problem."""
        nats = 0.0

        def draw(outcomes: Sequence[str], chances: np.ndarray) -> int:
            nonlocal nats
            (chosen,) = rng.choices(range(len(outcomes)), chances.tolist())
            nats -= math.log(chances[chosen])
            return chosen

        name, item, values = NAMES.index(problem.name), ITEMS.index(problem.item), problem.values
        parts = [f"<think>{OPENINGS[draw(OPENINGS, self.openings[name])]} {SCALE * values[0]}."]
        for step, before, after in zip(problem.steps, values, values[1:], strict=False):
            sign, number = step.operation
            lead = LEADS[draw(LEADS, self.leads[VERBS.index(step.verb)])]
            number *= SCALE if sign in "+-" else 1
            parts.append(f" And {lead}, {SCALE * before}{sign}{number}={SCALE * after}.")
        shelf = draw(CODES, self.shelves[item])
        row = draw(CODES, self.rows[shelf])
        closing = CLOSINGS[draw(CLOSINGS, self.closings[item])]
        parts.append(f" Shelf {CODES[shelf]}, row {CODES[row]}, {closing}.</think>\\boxed{{{SCALE * values[-1]}}}")
        return "".join(parts), nats


@dataclass(frozen=True, slots=True)
class Row:
    """A problem with one of its solutions; `nats` is what the solution costs whoever knows the probabilities."""

    question: str
    solution: str
    gold: str
    nats: float

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.solution}]


def question_of(problem: Problem) -> str:
    """Return the problem's text, its quantities times SCALE."""
    told = (
        f" {day} {step.verb}{'' if step.amount is None else f' {SCALE * step.amount}'}."
        for day, step in zip(DAYS, problem.steps, strict=False)
    )
    return f"{problem.name} has {SCALE * problem.start} {problem.item}.{''.join(told)} Total?"


def rows(writer: Writer, *, split: str, seed: int) -> Iterator[Row]:
    """Yield different problems of a split, each with one solution, the same for the same arguments."""
    rng = random.Random(f"align-world:{split}:{seed}")
    for problem in (each for each in stream((LEVEL,), split, seed) if max(each.values) <= TOP):
        solution, nats = writer.write(problem, rng)
        yield Row(question_of(problem), solution, str(SCALE * problem.values[-1]), nats)


# -- the two vocabularies

# What splits a text before any merge: words with the space before them and one digit alone; or words with any one
# character before them, three digits together, and punctuation that takes what follows.
PIECES = {
    "digits": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
    "merged": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+",
}
MERGES = {"digits": 140, "merged": 170}
TEXT_SEEDS = {
    "digits": 100,
    "merged": 101,
}  # two writers of strong habits: the frequent words of one are rare in the other
SPECIAL = {
    "digits": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "merged": ("<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
TEMPLATES = {
    "digits": (
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
    "merged": (
        "{{ '<|begin_of_text|>' }}{%- for message in messages -%}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
    ),
}
KINDS = tuple(PIECES)
CONTEXT = 192


def build_tokenizer(kind: str) -> Any:
    """Return one of the two tokenizers: byte-level BPE learnt from 1500 solutions of a writer of its own."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def bare(model: Any) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES[kind]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learning = bare(models.BPE())
    text = itertools.islice(rows(Writer(TEXT_SEEDS[kind], spread=2.5), split="train", seed=TEXT_SEEDS[kind]), 1500)
    learning.train_from_iterator(
        (f"{row.question} {row.solution}" for row in text),
        trainers.BpeTrainer(vocab_size=len(alphabet) + MERGES[kind], initial_alphabet=alphabet, show_progress=False),
    )
    learnt = json.loads(learning.to_str())["model"]
    vocab, merges = learnt["vocab"], [tuple(pair) for pair in learnt["merges"]]
    if kind == "merged":  # all numbers of two and three digits, as Llama-3 has them, whether the text has them or not
        for number in [*(f"{n:02d}" for n in range(100)), *(f"{n:03d}" for n in range(1000))]:
            vocab.setdefault(number, len(vocab))
    tokenizer = bare(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    special = SPECIAL[kind]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if kind == "digits":
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=None if kind == "digits" else special[1],
        eos_token=special[-1],
        chat_template=TEMPLATES[kind],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


# -- what is made once


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much the world's models have learnt: teachers from `Writer(0)`, students' first weights from `Writer(7)`."""

    teacher: str = "qwen3-nano:hidden_size=128,num_attention_heads=4,intermediate_size=384"
    teacher_steps: int = 1500
    student: str = "llama-nano:hidden_size=96,num_attention_heads=3,num_key_value_heads=3,intermediate_size=288"
    base_steps: int = 1000
    batch: int = 16
    rate: float = 3e-3


class World:
    """The world's files in a folder: made when first asked for, by one process at a time, and then used again."""

    def __init__(self, work: Path, *, sizes: Sizes | None = None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.sizes = sizes or Sizes()
        self.writer = Writer(0)

    def tokenizer(self, kind: str) -> Path:
        """Return the folder of a tokenizer."""
        folder = self.work / f"tokenizer-{kind}"
        with self._alone(folder.name):
            if not folder.exists():
                aside = folder.with_suffix(".making")
                build_tokenizer(kind).save_pretrained(aside)
                aside.rename(folder)
        return folder

    def teacher(self, kind: str) -> Path:
        """Return the model that knows the writer's probabilities, in this tokenizer: both read the same text."""
        return self._model(f"teacher-{kind}", kind, self.sizes.teacher, self.writer, self.sizes.teacher_steps, "cosine")

    def base(self, kind: str, seed: int) -> Path:
        """Return first weights of a student: it has met the words, the arithmetic and the habits of another writer.

        Its rate stays up, so that the arms, which let it fall, go on from a student that is still on its way.
        """
        steps, schedule = self.sizes.base_steps, "constant_with_warmup"
        return self._model(f"base-{kind}-{seed}", kind, self.sizes.student, Writer(7), steps, schedule, seed)

    def traces(self, seed: int, count: int) -> Path:
        """Return solutions by the writer, for the students of a seed; other seeds have other problems."""
        path = self.work / f"traces-{count}-{seed}.jsonl"
        with self._alone(path.name):
            if not path.exists():
                _save(path, itertools.islice(rows(self.writer, split="train", seed=1000 + seed), count))
        return path

    def heldout(self, count: int) -> tuple[Path, float]:
        """Return solutions of problems that are in nobody's training, and the nats that they cost the writer."""
        held = list(itertools.islice(rows(self.writer, split="heldout", seed=0), count))
        path = self.work / f"heldout-{count}.jsonl"
        with self._alone(path.name):
            if not path.exists():
                _save(path, held)
        return path, math.fsum(row.nats for row in held)

    def _model(self, name: str, kind: str, spec: str, writer: Writer, steps: int, schedule: str, seed: int = 0) -> Path:
        from distill.config import TrainConfig
        from distill.models import load_tokenizer
        from distill.run_folder import RUN
        from distill.train import run_training
        from students import build_student

        tokenizer = self.tokenizer(kind)
        out, text = self.work / name, self.work / f"text-{name.partition('-')[0]}-{seed}.jsonl"
        with self._alone(text.name):
            if not text.exists():  # both tokenizers read one text, none of it twice
                _save(text, itertools.islice(rows(writer, split="train", seed=seed), steps * self.sizes.batch))
        with self._alone(name):
            if (out / RUN).exists():
                return out
            config = TrainConfig(
                mode="hard-labels",
                student=spec,
                data=text,
                out=out,
                max_steps=steps,
                per_device_train_batch_size=self.sizes.batch,
                learning_rate=self.sizes.rate,
                lr_scheduler_type=schedule,
                save_steps=500,
                logging_steps=50,
                seed=seed,
                resume=True,
            )
            loaded = load_tokenizer(str(tokenizer))
            student = build_student(spec, tokenizer=loaded, seed=seed)
            run_training(config, model=student, tokenizer=loaded)
        return out

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Keep processes beside this one out while a thing of this name is made."""
        with (self.work / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _save(path: Path, solved: Iterable[Row]) -> None:
    """Write a trace file that is there whole or not at all."""
    aside = path.with_suffix(".making")
    with aside.open("w", encoding="utf-8") as stream_:
        stream_.writelines(json.dumps({"messages": row.messages, "answer": row.gold}) + "\n" for row in solved)
    aside.rename(path)


def main() -> None:
    """Make the models that a study needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="first weights of as many students of either kind")
    parser.add_argument("--part", default="1/1", help="I/N: only the I-th of N parts, which may run side by side")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    world = World(options.work)
    part, parts = map(int, options.part.split("/"))
    wanted = [(kind, seed) for seed in (None, *range(options.seeds)) for kind in reversed(KINDS)]
    for kind, seed in wanted[part - 1 :: parts]:
        print(world.teacher(kind) if seed is None else world.base(kind, seed), flush=True)


if __name__ == "__main__":
    main()
