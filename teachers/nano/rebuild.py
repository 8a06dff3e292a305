"""Train the embedded teacher from nothing: the command behind the weights that are shipped.

A Qwen3 of width 128 and 2 layers learns the worked traces of the train split at every level, by plain cross-entropy on
the trace's tokens; no problem is seen twice. About 160 CPU-seconds on one core. It knows nothing of trace stores,
recipes or trainers, because the rest of the toolkit is tested with what it makes. The same seed on the same machine
and software gives the same weights bit for bit; another machine may round differently and end a hair apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distill.errors import RunError
from teachers.nano.problems import LEVELS, solved
from teachers.nano.tokenizer import CONTEXT, build_tokenizer

STEPS = 3000
BATCH_SIZE = 16
LEARNING_RATE = 3e-3
WARMUP = 0.03  # share of the run
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
IGNORED = -100


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Return the embedded teacher's architecture: 0.44 M parameters, head_dim 32 (the least vLLM takes on CPU)."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def examples(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids of a rendered conversation up to its end token, length of the prompt) without end."""
    for prompt, solution in solved(LEVELS, "train", seed):
        asked = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, return_dict=False)
        worked = tokenizer(solution, add_special_tokens=False).input_ids
        yield [*asked, *worked, tokenizer.eos_token_id], len(asked)


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `ids` and `targets`, both (B, T): right-padded; a target is the next token, IGNORED outside the trace."""
    length = max(len(ids) for ids, _ in rows) - 1
    ids = torch.full((len(rows), length), pad)
    targets = torch.full((len(rows), length), IGNORED)
    for row, (tokens, prompt_length) in enumerate(rows):
        ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        targets[row, prompt_length - 1 : len(tokens) - 1] = torch.tensor(tokens[prompt_length:])
    return ids, targets


def schedule(done: float) -> float:
    """Return the learning rate at `done` in [0, 1) of the run: linear warm-up, then a cosine to 0."""
    if done < WARMUP:
        return LEARNING_RATE * (done + 1e-3) / (WARMUP + 1e-3)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seconds: float | None,
    seed: int,
    progress: Progress,
) -> None:
    """Train in place. With `seconds` the clock, and no longer `steps`, drives the schedule and the end.

    Raises:
        RunError: the loss is no longer a number.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    stream = examples(tokenizer, seed)
    began = time.monotonic()
    task = progress.add_task("training the embedded teacher", total=1.0, loss=math.nan)
    step, done = 0, 0.0
    model.train()
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule(done)
        ids, targets = collate([next(stream) for _ in range(BATCH_SIZE)], tokenizer.pad_token_id)
        # Right padding under a causal mask cannot reach the trained positions: no attention mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        if not torch.isfinite(loss):
            raise RunError(f"the teacher's loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        done = (time.monotonic() - began) / seconds if seconds else step / steps
        if step % 50 == 0 or done >= 1:
            progress.update(task, completed=min(done, 1.0), loss=loss.item())
    model.eval()


def rebuild_teacher(
    out: Path, *, steps: int = STEPS, seconds: float | None = None, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Train the embedded teacher on one thread and write its folder: fp16 weights, config, tokenizer.

    Args:
        out: the folder; files of an earlier teacher in it are replaced.
        steps: optimizer steps of 16 problems.
        seconds: wall-clock seconds in place of steps; the result then depends on the machine's speed.
        seed: of the initial weights and of the problems.
        progress: a started rich progress to report to; None shows one of its own on stderr.

    Returns:
        `out`, as `from_pretrained` and vLLM take it (float32 by its config; the file holds float16).

    Raises:
        RunError: the loss is no longer a number.
    """
    if progress is None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as shown:
            return rebuild_teacher(out, steps=steps, seconds=seconds, seed=seed, progress=shown)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would be another teacher
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = build_tokenizer()
            model = Qwen3ForCausalLM(teacher_config(tokenizer))
            train(model, tokenizer, steps=steps, seconds=seconds, seed=seed, progress=progress)
    finally:
        torch.set_num_threads(threads)
    save(model, tokenizer, out)
    return out


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder; halves the weights in place, but leaves the config at float32, which is how they are run."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SAMPLING
    )
    model.half().save_pretrained(out)
    model.config.dtype = torch.float32
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
