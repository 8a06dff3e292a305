"""The commands a stage can be: what each makes, what it reads, and which settings cannot change its result.

A setting that is new and not named here counts as one that can: better a stage done twice than a stale one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from distill.config import (
    CompareConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    ScoreConfig,
    Section,
    TrainConfig,
)
from distill.run_folder import FREE

# Speed and wording only. Not here: where a server is, how long it is waited for and how often it is asked again decide
# who answers, and which answers are missing.
_ENGINE = frozenset({"concurrency", "data_parallel_size", "verifier_workers"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command as a stage.

    `reads` has every setting that names something on the disk, and its kind (see `KINDS`). `free` are settings left out
    of the hash. `locks` is the setting whose folder no other stage may use meanwhile. `always` is typed in any case.
    `anew`: what it left unfinished it does not go on with. `refused` has settings a stage cannot have, and why.
    """

    config: type[Section]
    makes: str
    reads: Mapping[str, str]
    free: frozenset[str] = frozenset()
    locks: str | None = None
    always: tuple[str, ...] = ()
    anew: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)


# Of each kind of thing to read, which makers' folders are one.
KINDS: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "teacher": ("model", "store"),  # a store speaks through --backend replay
    "prompts": ("store",),
    "data": ("store",),
    "store": ("store",),
    "signal": ("signal",),
    "evaluation": ("evaluation",),
    "file": ("store", "model", "signal", "evaluation", "comparison"),
    "code": (),
}

_JUDGING = {"judge": "model", "verifier": "code", "decontaminate": "file"}
COMMANDS: dict[str, Command] = {
    "generate": Command(
        config=GenerateConfig,
        makes="store",
        reads={
            "prompts": "prompts",
            "teacher": "teacher",
            "chat_template": "file",
            "check_template": "model",
            "backend": "code",
            **_JUDGING,
        },
        free=_ENGINE | {"log_seconds"},
    ),
    "filter": Command(
        config=FilterConfig,
        makes="store",
        reads={"store": "store", **_JUDGING},
        free=frozenset({"verifier_workers"}),
        locks="store",
        anew=True,
        refused={"verifier": "judging again changes the store that is read; give it to the stage that generates"},
    ),
    "score": Command(
        config=ScoreConfig,
        makes="signal",
        reads={"store": "store", "teacher": "teacher", "chat_template": "file", "backend": "code"},
        free=_ENGINE & ScoreConfig.model_fields.keys(),
        locks="store",
    ),
    "train": Command(
        config=TrainConfig,
        makes="model",
        reads={
            "student": "model",
            "teacher": "model",
            "tokenizer": "model",
            "teacher_tokenizer": "model",
            "data": "data",
            "signal": "signal",
            "chat_template": "file",
            **dict.fromkeys(("mode", "loss", "divergence", "align", "reward", "verifier"), "code"),
        },
        free=frozenset(FREE),  # a run that is not finished refuses any other change itself
        always=("--resume",),
    ),
    "eval": Command(
        config=EvalConfig,
        makes="evaluation",
        reads={
            "model": "model",
            "prompts": "prompts",
            "text": "data",
            "mde_from": "evaluation",
            "trained_before": "model",
            "chat_template": "file",
            "verifier": "code",
            "backend": "code",
        },
        free=_ENGINE,
    ),
    "compare": Command(
        config=CompareConfig,
        makes="comparison",
        reads={"evaluations": "evaluation", "store": "store", "teacher": "model"},
    ),
}
