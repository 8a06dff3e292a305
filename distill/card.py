"""The dataset card beside an exported file: what a stranger must know before training on it.

Markdown with the YAML front matter that Hugging Face reads, made by `data/card.md.j2` from what the store says of
itself. What the store does not know is called unknown; nothing is guessed. Names, prompts and reasons are text written
by others: whatever the template prints is made inert first (`inert`), unless it was made here.
"""

from __future__ import annotations

import json
import re
import shlex
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from distill.config import ExportConfig
from distill.errors import UserError
from distill.report import FILTERS, nice_step
from distill.store import FUNNEL, KEPT, MANIFEST, REJECTED, read_lines, replacing
from distill.template_check import TemplateReport

CONTAMINATION = "contamination.json"
SHOWN_HITS = 10  # of the contamination report, whole in the store
SHOWN_CHARACTERS = 300  # of a name or text
COUNTS = ("samples", "kept", "rejected", "reasons", "flags")  # of funnel.json; what else stands there are the rules
QUANTILES = {"least": 0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "most": 1}
BAR = 32  # characters of the longest bar
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
TAGS = ["distill", "synthetic", "reasoning", "chain-of-thought", "knowledge-distillation"]


@dataclass(slots=True)
class Tally:
    """What the rows of an export are made of, counted while they pass; holds numbers and prompt uids, no texts."""

    traces: int = 0
    rows: int = 0
    skipped: int = 0  # prompts left out by the format
    lengths: array[int] = field(default_factory=lambda: array("q"))  # tokens of each completion
    prompts: set[str] = field(default_factory=set)
    teachers: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    verifiers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def read(self, row: Mapping[str, Any]) -> bool:
        """Count a row of kept.jsonl; return whether its prompt was there before."""
        self.traces += 1
        self.lengths.append(int(row.get("num_completion_tokens") or 0))
        self.teachers[str(row.get("teacher") or "unknown")] += 1
        self.backends[str(row.get("backend") or "unknown")] += 1
        last = (row.get("verdicts") or [{}])[-1]
        self.verifiers[str(last.get("verifier") or "none"), str(last.get("version") or "")] += 1
        prompt = str(row.get("prompt_uid") or row["messages"][:-1])
        seen = prompt in self.prompts
        self.prompts.add(prompt)
        return seen


def write_card(path: Path, config: ExportConfig, tally: Tally, report: TemplateReport | None) -> None:
    """Write the card of an export.

    Args:
        report: of `--check-template`, where it was asked for.

    Raises:
        UserError: a file of the store is damaged, or its funnel does not add up to what was exported.
        RunError: the disk is full.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    store = config.store
    funnel, manifest = _read(store / FUNNEL, dict), _read(store / MANIFEST, dict) or {}
    hits = _read(store / CONTAMINATION, list)
    if funnel is not None:
        _check_funnel(store, funnel, tally.traces)
    environment = Environment(
        loader=PackageLoader("distill", "data"), undefined=StrictUndefined, trim_blocks=True, finalize=inert
    )
    environment.filters.update(
        {name: _made_here(FILTERS[name]) for name in ("count", "percent", "flops", "duration")},
        python=lambda text: Markup(repr(str(text))),
        quoted=lambda text: Markup(json.dumps(str(text), ensure_ascii=False)),
        fenced=fenced,
    )
    page = environment.get_template("card.md.j2").render(
        front=Markup(_front_matter(config, tally.rows)),
        config=config,
        file=config.out.name,
        loader="parquet" if config.out.suffix == ".parquet" else "json",
        mathematical={name for name, _ in tally.verifiers} <= {"math", "none"},
        tally=tally,
        version=version("distill"),
        manifest=manifest,
        recipe=manifest.get("recipe", {}),
        versions=_merged_versions(manifest),
        funnel=funnel,
        further={key: json.dumps(value) for key, value in (funnel or {}).items() if key not in COUNTS},
        tokens=_lengths(tally.lengths),
        hits=hits,
        hit_counts=Counter((str(h.get("file")), str(h.get("level")), str(h.get("kind"))) for h in hits or ()),
        shown_hits=SHOWN_HITS,
        tainted=len({str(hit.get("prompt_uid")) for hit in hits or ()} & tally.prompts),
        report=report,
        commands=commands(config, manifest, funnel or {}, tally),
    )
    with replacing(path) as stream:
        stream.write(page.encode("utf-8", "replace").decode("utf-8"))  # a name may hold half of a surrogate pair


def card_of(path: Path) -> str | None:
    """Return the name of the file that a card made here describes; None where `path` is no such card."""
    try:
        text = path.read_text(encoding="utf-8")
        loaded = yaml.safe_load(text.removeprefix("---\n").partition("\n---\n")[0]) if text[:4] == "---\n" else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    mark = loaded.get("distill") if isinstance(loaded, dict) else None
    return mark.get("file") if isinstance(mark, dict) else None


def inert(value: Any) -> Any:
    """Return what a template may print: numbers and what was made here as they are, any text without effect.

    A text becomes a code span, in which Markdown and HTML mean nothing, or, where it has a `|` that could end a cell
    of a table, words whose every sign is a numeric entity. White space becomes single blanks, what cannot be seen its
    escape, and what is very long is cut.
    """
    if isinstance(value, (Markup, int, float)):
        return value
    text = " ".join(str(value).split())
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if not text:
        return Markup("(empty)")
    if "|" in text:
        return Markup("".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text))
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[0], text[-1]) else ""
    return Markup(f"{ticks}{space}{text}{space}{ticks}")


def fenced(text: str, language: str = "") -> Markup:
    """Return a code block; its fence is longer than any in the text."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{ticks}{language}\n{text}\n{ticks}")


def commands(config: ExportConfig, manifest: Mapping[str, Any], funnel: Mapping[str, Any], tally: Tally) -> str:
    """Return the command lines that lead to the file, as far as the store knows them; one a line."""
    recipe = manifest.get("recipe", {})
    judged = [run.get("verifier") for run in manifest.get("runs", ())]
    generate = {
        "prompts": recipe.get("prompts"),
        "teacher": manifest.get("teacher_model"),
        "backend": next(iter(tally.backends)) if len(tally.backends) == 1 else None,
        "n": _samples(config.store),
        **recipe.get("sampling", {}),
        **{name: recipe.get(name) for name in ("seed", "system_prompt", "reasoning")},
        "verifier": judged[-1] if judged else None,
        **{name: funnel.get(name) for name in ("keep", "drop")},
        "out": str(config.store),
    }
    lines = [_command("generate", generate)] if recipe else []
    export = config.model_dump(mode="json", exclude_defaults=True, exclude={"store"})
    return "\n".join([*lines, _command("export", export, str(config.store))])


def _samples(store: Path) -> int:
    """Return the most samples that any prompt was given."""
    views = [read_lines(store / name) for name in (KEPT, REJECTED) if (store / name).is_file()]
    return 1 + max(int(row.get("sample_index") or 0) for _, row in chain(*views))


def _command(name: str, settings: Mapping[str, Any], *arguments: str) -> str:
    words = ["distill", name, *arguments]
    for key, value in settings.items():
        if value is None or value == "" or value is False:
            continue
        joined = (":" if key == "loop_stop" else ",").join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"-{key}" if len(key) == 1 else f"--{key.replace('_', '-')}", *([] if value is True else [joined])]
    return shlex.join(words)


def _front_matter(config: ExportConfig, rows: int) -> str:
    front = {
        "license": config.licence,
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES if rows < limit), "n>1M")],
        "tags": [*TAGS, *(["grpo"] if config.format == "grpo" else [])],
        "configs": [{"config_name": "default", "data_files": config.out.name}],
        "distill": {"file": config.out.name, "format": config.format, "version": version("distill")},
    }
    return yaml.safe_dump(front, sort_keys=False)  # escapes whatever is not plain ASCII


def _check_funnel(store: Path, funnel: Mapping[str, Any], traces: int) -> None:
    try:
        total, kept, rejected = int(funnel["samples"]), int(funnel["kept"]), sum(dict(funnel["rejected"]).values())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{store / FUNNEL} lacks samples, kept or rejected") from error
    if kept + rejected != total or kept != traces:
        raise UserError(
            f"{store / FUNNEL} says {total} samples, {kept} kept and {rejected} rejected, but kept.jsonl has {traces}: "
            "make both again with distill filter"
        )


def _lengths(lengths: array[int]) -> dict[str, Any]:
    """Return quantiles of the completions' lengths, and a histogram in at most ten bins of a round width."""
    values = np.frombuffer(lengths, dtype=np.int64)
    step = max(1, int(nice_step(float(values.max() - values.min()), 10)))
    first = int(values.min()) // step
    counts = np.bincount(values // step - first)
    return {
        "quantiles": [(name, float(np.quantile(values, share))) for name, share in QUANTILES.items()],
        "mean": float(values.mean()),
        "total": int(values.sum()),
        "bins": [
            (
                (first + i) * step,
                (first + i + 1) * step - 1,
                int(n),
                Markup("█" * round(BAR * n / counts.max()) or ("▏" if n else "")),
            )
            for i, n in enumerate(counts)
        ],
    }


def _merged_versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return every version that a run of the store had of each package."""
    found: dict[str, dict[str, None]] = {}
    for run in manifest.get("runs", ()):
        for package, number in run.get("versions", {}).items():
            found.setdefault(package, {})[str(number)] = None
    return {package: ", ".join(numbers) for package, numbers in found.items()}


def _made_here(function: Any) -> Any:
    return lambda value: Markup(function(value))


def _read(path: Path, kind: type) -> Any:
    """Return a JSON file's value, None where there is no such file.

    Raises:
        UserError: it is damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {'list' if kind is list else 'object'}")
    return value
