"""A student's rollouts by vLLM: an engine beside the trainer, given the student's weights whenever they have changed.

The weights travel through a folder (in memory where the machine has such a place), which vLLM's own `reload_weights`
reads in place, so tensor parallelism and several workers are its business. Every token comes with the log-probability
that the engine drew it with: that is the distribution the ratio of a policy gradient is against, and tests hold it
against the trainer's own. Each completion has a seed of its own.

One process only: with several ranks each would want the device.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from distill.errors import RunError, UserError
from distill.lora import is_lora, merged
from distill.rollouts import Completed
from distill.token_signal import SignalSpec
from teachers.engines.vllm_engine import VllmEngine
from teachers.engines.vllm_sampling import one_line, sample_parameters

SHARED_MEMORY = Path("/dev/shm")
GPU_SHARE = 0.3  # of the device's memory, beside the trainer; TRL's default


class VllmWriter:
    """Writes completions with the weights that were last given; use as a context manager.

    Args:
        student: the model, as it is now.
        tokenizer: its tokenizer.
        concurrency: completions in flight.
        engine_args: `key=value` for vLLM's own engine arguments.

    Raises:
        UserError: vLLM is not installed, or refuses the model or an argument.
    """

    def __init__(
        self, student: Any, tokenizer: Any, *, concurrency: int | None = None, engine_args: Iterable[str] = ()
    ) -> None:
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() and _fits(student, SHARED_MEMORY) else None
        self.folder = Path(tempfile.mkdtemp(prefix="distill-rollouts-", dir=place))
        try:
            tokenizer.save_pretrained(self.folder)
            self._save(student)
            given = list(engine_args)
            # Left to itself vLLM holds a float32 model in half of that, and draws from another distribution.
            usual = {"gpu_memory_utilization": GPU_SHARE, "dtype": str(student.dtype).removeprefix("torch.")}
            named = {pair.partition("=")[0].strip().replace("-", "_") for pair in given}
            given += [f"{name}={value}" for name, value in usual.items() if name not in named]
            self.engine = VllmEngine(
                str(self.folder), concurrency=concurrency, engine_args=given, logprobs_mode="processed_logprobs"
            )
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> VllmWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def sync(self, student: Any) -> None:
        """Give the engine the student's weights, and let it forget what it had computed with others.

        Raises:
            RunError: vLLM does not take them.
        """
        self._save(student)
        try:
            self.engine.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
            self.engine.engine.reset_prefix_cache()
        except Exception as error:  # what a worker raised arrives as whatever vLLM makes of it
            raise RunError(f"vLLM does not take the student's weights: {one_line(error)}") from error

    def write(
        self, prompts: Sequence[Sequence[int]], *, rooms: Sequence[int], seeds: Sequence[int], temperature: float
    ) -> list[Completed]:
        """Return a completion of each prompt, in order.

        Args:
            prompts: token ids.
            rooms: most tokens of each completion.
            seeds: of each, below 2^63.
            temperature: 0 is greedy.
        """
        jobs: dict[str, int] = {}
        found: dict[int, Completed] = {}
        waiting = list(range(len(prompts)))[::-1]
        while waiting or jobs:
            while waiting and len(jobs) < self.engine.room:
                job = waiting.pop()
                parameters = sample_parameters(
                    {"temperature": temperature, "top_p": 1.0},
                    seed=seeds[job],
                    limit=rooms[job],
                    end_ids=self.engine.end_ids,
                    signal=SignalSpec("top", 1),
                )
                try:
                    jobs[self.engine._add(list(prompts[job]), parameters)] = job
                except ValueError as error:
                    raise UserError(f"vLLM refuses a rollout: {one_line(error)}") from error
            for name, output in self.engine._step(jobs):
                sample = output.outputs[0]
                ids = [int(token) for token in sample.token_ids]
                logps = [sample.logprobs[at][token].logprob for at, token in enumerate(ids)]
                found[jobs.pop(name)] = Completed(ids, bool(ids) and ids[-1] in self.engine.end_ids, logps)
        return [found[job] for job in range(len(prompts))]

    def _save(self, student: Any) -> None:
        """Write the model whole: under another name, then moved into place.

        Output embeddings are written as a matrix of their own even where they are the input embeddings: vLLM on a CPU
        repacks them when it starts, and a reload would leave the old ones where the checkpoint does not name them.
        """
        aside = self.folder / "aside"
        plain = merged(student) if is_lora(student) else student
        config = copy.deepcopy(plain.config)
        config.tie_word_embeddings = False
        config.save_pretrained(aside)
        plain.generation_config.save_pretrained(aside)
        weights = {name: value.detach().contiguous() for name, value in plain.state_dict().items()}
        if plain.config.tie_word_embeddings:
            weights["lm_head.weight"] = plain.get_output_embeddings().weight.detach().clone()
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        for path in aside.iterdir():
            path.replace(self.folder / path.name)
        aside.rmdir()


def _fits(student: Any, folder: Path) -> bool:
    size = sum(weight.numel() * weight.element_size() for weight in student.parameters())
    return shutil.disk_usage(folder).free > 3 * size
