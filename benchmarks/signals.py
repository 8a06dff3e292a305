"""What storing a teacher's numbers costs and changes: ours, DistillKit's way, and the K most likely as they are.

All store the same teacher's numbers for the same traces, and are compared with its whole distribution. Two tables. The
first: bytes per token, beside the information in arbitrary sets of that many ids (for draws, and in counts that add up
to N); the mean error of a log-probability; and the processor time to write, and to load as numbers that a loss can
use, by turns on one thread. The second, what is learnt from them: total variation to the teacher after renormalising,
and with what is left over as an outcome of its own; and the gradient of the forward KL at the output head's weight,
against the one from the whole distribution: angle and ratio of norms summed over all tokens, relative error of one
token's. Once for a student that knows nothing, once for one that has almost arrived (the teacher's logits / 1.25).
Random draws err more on one token but do not err in the mean: their angle is noise, which falls as a batch grows.

usage: python benchmarks/signals.py [--model DIR [--prompts FILE | --text FILE]] [--traces N] [--rounds N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import distillkit_signals as distillkit
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stored_signals import Likeliest, Ours, Rows, Teacher, renormalised

from distill.models import load_model, load_tokenizer
from distill.render import render_prompt
from distill.signals import SignalSpec
from teachers import nano
from teachers.nano.problems import solved

ROOT = Path(__file__).resolve().parents[1]
PIECE = 256  # tokens of a trace that is cut from a plain text
WIDTH = 128  # of the student's last hidden states
NEAR = 1.25
CHUNK = 32  # tokens whose whole distributions are held in float64 at once
NOTES = """\
bound: log2 C(V, U) bits for the U ids of a position, log2 C(N - 1, U - 1) for counts, nothing for log-probabilities.
DistillKit: reimplemented, checked to give the same bytes and errors; without its parquet overhead; "scaled" is an
option that it does not recommend. Loading is compared with DistillKit's of the same K, else with its fastest."""


class Judge:
    """The whole distribution's gradients, with which others are compared."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        torch.manual_seed(0)
        self.hidden = torch.nn.functional.layer_norm(torch.randn(len(teacher.tokens), WIDTH), (WIDTH,))
        self.hidden += 0.5 * torch.randn(WIDTH)  # hidden states of one model have much in common
        self.head = 0.02 * torch.randn(teacher.vocab_size, WIDTH)

    def chunks(self, near: bool) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield tokens, the student's and the teacher's probabilities (n, V) and the hidden states (n, WIDTH)."""
        for begin in range(0, len(self.teacher.tokens), CHUNK):
            at = slice(begin, begin + CHUNK)
            logits = self.teacher.logits[at].double()
            student = logits / NEAR if near else (self.hidden[at] @ self.head.T).double()
            yield at, *(each.softmax(-1).numpy() for each in (student, logits)), self.hidden[at].double().numpy()

    @cached_property
    def whole(self) -> list[np.ndarray]:
        """The gradients (V, WIDTH) from the whole distribution, of an untrained and of a near student."""
        return [sum((s - t).T @ h for _, s, t, h in self.chunks(near)) for near in (False, True)]

    def gradients(self, target: Callable[[slice, np.ndarray], np.ndarray]) -> list[tuple[float, float, float]]:
        """Return (angle in degrees, ratio of norms, relative error of one token) for both students."""
        found = []
        for near, whole in zip((False, True), self.whole, strict=True):
            total, wrong, right = np.zeros_like(whole), 0.0, 0.0
            for at, student, teacher, hidden in self.chunks(near):
                aim = target(at, student)
                gradient = aim.sum(-1, keepdims=True) * student - aim
                total += gradient.T @ hidden
                wrong += np.square(gradient - (student - teacher)).sum()
                right += np.square(student - teacher).sum()
            norms = np.linalg.norm(total), np.linalg.norm(whole)
            angle = math.degrees(math.acos(min(1.0, float((total * whole).sum() / norms[0] / norms[1]))))
            found.append((angle, float(norms[0] / norms[1]), math.sqrt(wrong / right)))
        return found

    def errors(self, rows: Rows, target: Callable[[slice, np.ndarray], np.ndarray]) -> tuple[float | None, ...]:
        """Return mean |log-probability error|, total variation after renormalising, and with the tail as an outcome."""
        logprobs = torch.log_softmax(self.teacher.logits.double(), -1).numpy()
        kept = rows.ids >= 0
        true = np.where(kept, np.take_along_axis(logprobs, np.maximum(rows.ids, 0).astype(np.int64), -1), -np.inf)
        total, vocab_size = 0.0, self.teacher.vocab_size
        for at, _, teacher, _ in self.chunks(near=False):
            aim = renormalised(rows, at, vocab_size) if rows.counts is None else target(at, teacher)
            total += np.abs(aim / aim.sum(-1, keepdims=True) - teacher).sum() / 2
        variation = total / len(logprobs)
        if rows.logprobs is None:
            return None, variation, None
        mean = float(np.abs(rows.logprobs[kept] - true[kept]).mean())
        if rows.counts is not None:
            return mean, variation, None
        said, meant = np.exp(rows.logprobs.astype(np.float64)), np.exp(true)
        left = np.maximum(1 - said.sum(-1), 0) if rows.tail is None else np.exp(rows.tail.astype(np.float64))
        apart = np.abs(said - meant).sum(-1) + np.abs(left - (1 - meant.sum(-1)))
        return mean, variation, float(apart.mean() / 2)


def read_traces(options: argparse.Namespace, tokenizer: object) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of prompts and of what follows them."""
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[operator] # noqa: E731
    if options.text:
        ids = encode(Path(options.text).read_text(encoding="utf-8"))
        yield from ((ids[at : at + 1], ids[at + 1 : at + 1 + PIECE]) for at in range(0, len(ids) - PIECE, PIECE))
        return
    if options.model:
        rows = map(json.loads, Path(options.prompts).read_text(encoding="utf-8").splitlines())
        pairs = (([{"role": "user", "content": row["question"]}], row["answer"]) for row in rows)
    else:
        pairs = ((list(prompt.messages), solution) for prompt, solution in solved(limit=options.traces))
    for messages, answer in pairs:
        yield encode(render_prompt(tokenizer, messages)[0]), encode(answer)


@torch.inference_mode()
def ask(options: argparse.Namespace) -> Teacher:
    """Return what the teacher says along the traces."""
    name = options.model or str(nano.model_path())
    model, tokenizer = load_model(name, dtype=options.dtype), load_tokenizer(name)
    lengths, tokens, logits = [], [], []
    for prompt, completion in itertools.islice(read_traces(options, tokenizer), options.traces):
        said = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
        logits.append(said[len(prompt) - 1 : -1].float())
        lengths.append(len(completion))
        tokens += completion
    return Teacher(Path(name).name if options.model else "nano", lengths, torch.tensor(tokens), torch.cat(logits))


def times(schemes: list[Ours | Likeliest], folder: Path, rounds: int) -> list[tuple[float, float]]:
    """Return the processor seconds to write and to load everything, medians over turns; the first turn warms up."""
    spent: list[list[tuple[float, float]]] = [[] for _ in schemes]
    for turn in range(rounds + 1):
        for number, scheme in enumerate(schemes):
            path = folder / f"{number}-{turn}"
            began = time.process_time()
            scheme.write(path)
            written = time.process_time()
            scheme.batches(path)
            spent[number].append((written - began, time.process_time() - written))
    return [tuple(map(statistics.median, zip(*each[1:], strict=True))) for each in spent]


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder, instead of the embedded teacher")
    parser.add_argument("--dtype", default="float32", help="of its weights")
    parser.add_argument("--prompts", default=str(ROOT / "recipes/problems/gsm8k_train_300.jsonl"), help="for --model")
    parser.add_argument("--text", help="a plain text, cut into traces of 256 tokens, instead of --prompts")
    parser.add_argument("--traces", type=int, default=8)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3, help="times the contenders take turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = ask(options)
    count, width = len(teacher.tokens), teacher.vocab_size
    schemes: list[Ours | Likeliest] = []
    for size in (8, 50, 128):
        if size < width:
            schemes.append(Ours(teacher, SignalSpec("top", size)))
    schemes += [Ours(teacher, SignalSpec("sampled", options.draws, logprobs=kept)) for kept in (False, True)]
    curves = {"budget": distillkit.BUDGET, "recommended": distillkit.RECOMMENDED, "rec., scaled": distillkit.SCALED}
    for name, curve in curves.items():
        if curve.size < width:
            schemes.append(Likeliest(teacher, f"DistillKit {name}: top-{curve.size}", curve.size, curve))
    schemes += [Likeliest(teacher, f"raw top-{size}: bf16, int32", size) for size in (50, 128) if size < width]
    sizes = Table(title=f"{teacher.name}: {len(teacher.lengths)} traces, {count} tokens, V = {width}")
    learnt = Table(title="what is learnt: against the whole distribution")
    for column in (
        "stored",
        "B/token",
        "bound",
        "entries",
        "B/entry",
        "|Δ log p|",
        "write µs",
        "load µs",
        "load, times as fast",
    ):
        sizes.add_column(column, justify="left" if column == "stored" else "right")
    for column in (
        "stored",
        "TV renorm.",
        "TV, K+1",
        "untrained: angle",
        "norm",
        "token",
        "near: angle",
        "norm",
        "token",
    ):
        learnt.add_column(column, justify="left" if column == "stored" else "right")
    judge = Judge(teacher)
    with tempfile.TemporaryDirectory() as name:
        spent = times(schemes, Path(name), options.rounds)
        peers: dict[int, float] = {}
        for scheme, (_, load) in zip(schemes, spent, strict=True):
            if "DistillKit" in scheme.name:
                peers[scheme.size] = min(load, peers.get(scheme.size, load))
        for number, (scheme, (write, load)) in enumerate(zip(schemes, spent, strict=True)):
            path = Path(name) / f"{number}-0"
            rows = scheme.load(path)
            target = scheme.target(rows)
            error, variation, apart = judge.errors(rows, target)
            each, entries = scheme.bytes(path) / count, (rows.ids >= 0).sum() / count
            faster = f"{peers.get(scheme.size, min(peers.values())) / load:.1f}" if peers else ""
            figures = (f"{each:.1f}", f"{scheme.bound:.1f}", f"{entries:.1f}", f"{each / entries:.2f}")
            seconds = (f"{1e6 * value / count:.1f}" for value in (write, load))
            sizes.add_row(scheme.name, *figures, shown(error, ".4f"), *seconds, faster)
            forms = (".2f", ".3f", ".3f")
            pairs = (pair for each in judge.gradients(target) for pair in zip(each, forms, strict=True))
            compared = [format(value, form) for value, form in pairs]
            learnt.add_row(scheme.name, shown(variation, ".3f"), shown(apart, ".4f"), *compared)
    console = Console(width=max(130, Console().width))
    console.print(sizes)
    console.print(NOTES)
    console.print(learnt)


if __name__ == "__main__":
    main()
