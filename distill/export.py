"""`distill export`: the kept traces as a file that other trainers read, and its dataset card.

A format is a function from a kept row to a row of the file, named in `FORMATS`. Rows are streamed, so a store of any
size passes through; the file gets its name only when it is whole. Nothing is chosen here (`distill filter` does that)
and nothing is repaired: a conversation that a format cannot carry is refused by its line, since the trainers that read
such a file skip it silently or fail late.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from distill.card import Tally, card_of, write_card
from distill.config import ExportConfig
from distill.dataset import conversation
from distill.errors import UserError
from distill.progress import Meter, say
from distill.store import KEPT, REJECTED, dump_line, read_lines, replacing, write_json
from distill.tables import lookup
from distill.template_check import TemplateReport, require_template

DATASET_INFO = "dataset_info.json"  # where LLaMA-Factory looks a dataset up
SPEAKERS = {"user": "human", "assistant": "gpt"}
BATCH_ROWS = 1000  # of a Parquet row group
# Line ends to Python's splitlines, which some readers of .jsonl use; in JSON they stand inside texts only.
LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """One list of messages, the assistant's turn last: TRL's and axolotl's conversations."""
    return {"messages": row["messages"], **_origin(row)}


def prompt_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt and completion apart, both as messages: TRL trains the completion alone."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:], **_origin(row)}


def sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turns `from` human and gpt in `conversations`, the system prompt beside them: LLaMA-Factory's sharegpt.

    Raises:
        UserError: the turns do not alternate, beginning with the user's: LLaMA-Factory would skip the row.
    """
    turns = list(row["messages"])
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    roles = [turn["role"] for turn in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(f"sharegpt needs user and assistant by turns after the system prompt; its roles are {roles}")
    said = [{"from": SPEAKERS[turn["role"]], "value": turn["content"]} for turn in turns]
    return {"conversations": said, "system": system, **_origin(row)}


def openai(row: Mapping[str, Any]) -> dict[str, Any]:
    """`messages` and nothing else, as the fine-tuning API takes them; the reasoning stays inside the content.

    Raises:
        UserError: a role that the API does not know.
    """
    unknown = {turn["role"] for turn in row["messages"]} - {"system", "user", "assistant"}
    if unknown:
        raise UserError(f"openai takes the roles system, user and assistant, not {', '.join(sorted(unknown))}")
    return {"messages": row["messages"]}


def grpo(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A prompt and its `solution`, one row for each prompt with a gold answer: TRL's GRPO.

    What math-verify has judged, or nothing has, is put into a box: TRL's `accuracy_reward` reads a bare LaTeX gold as
    another number or not at all (108 of the 500 golds of MATH-500). `gold` is the answer as it came.
    """
    gold = row.get("gold")
    if not gold:
        return None
    judged_by = {verdict.get("verifier") for verdict in row.get("verdicts", ())[-1:]}
    solution = f"\\boxed{{{gold}}}" if judged_by <= {"math"} and "\\boxed" not in gold else gold
    return {"prompt": row["messages"][:-1], "solution": solution, "gold": gold, "source": row.get("source") or ""}


grpo.unit = "prompt"  # type: ignore[attr-defined]  # one row for each prompt, not for each trace

# name -> f(row of kept.jsonl) -> row of the file, or None where there is none to make
FORMATS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any] | None]] = {
    "messages": messages,
    "prompt-completion": prompt_completion,
    "sharegpt": sharegpt,
    "openai": openai,
    "grpo": grpo,
}


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Carry out `distill export`: the file at `config.out`, a dataset card beside it; return the summary.

    Raises:
        UserError: no kept traces, an unknown format or suffix, a file there that is not an earlier export, a row that
            the format cannot carry, or a student's chat template with a fault. Nothing is written then.
        RunError: the disk is full.
    """
    form = lookup(FORMATS, config.format, "format")
    by_prompt = getattr(form, "unit", "trace") == "prompt"
    write = WRITERS.get(config.out.suffix)
    if write is None or (config.format == "openai" and config.out.suffix != ".jsonl"):
        allowed = ".jsonl" if config.format == "openai" else " or ".join(WRITERS)
        raise UserError(f"--out {config.out}: the file must end in {allowed}")
    kept = config.store / KEPT
    if not kept.is_file():
        raise UserError(f"{config.store} has no {KEPT}: it is neither a trace store nor a folder made by filter")
    card = card_path(config.out)
    listed = dataset_info(config.out) if config.format == "sharegpt" else None
    report = _check_template(config, kept, by_prompt)
    tally = Tally()
    rates = pass_rates(config.store) if by_prompt else None
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot make its folder: {error.strerror or error}") from error
    with kept.open("rb") as stream:
        total = sum(1 for _ in stream)
    with replacing(config.out) as stream, Meter("export", total) as meter:
        write(stream, _rows(kept, form, by_prompt, rates, tally, meter))
        if not tally.rows:
            why = f"none of its {tally.skipped} prompts has a gold answer" if tally.skipped else "it is empty"
            raise UserError(f"{kept}: nothing to export, {why}")
        # The file comes last: a card without its file does no harm, a file without its card could not be replaced.
        if listed is not None:
            write_json(config.out.with_name(DATASET_INFO), listed)
        write_card(card, config, tally, report)
    if tally.skipped:
        say(f"left out {tally.skipped} prompts without a gold answer")
    return {
        "out": str(config.out),
        "card": str(card),
        "format": config.format,
        "rows": tally.rows,
        "traces": tally.traces,
        "skipped": tally.skipped,
        "template_notes": list(report.notes) if report else [],
    }


def pass_rates(store: Path) -> dict[str, tuple[float, int]] | None:
    """Return for every prompt_uid the share of its samples that are right, and how many there are; failed ones aside.

    Read from the two views, which together are all samples of the journal; None where there is no rejected.jsonl.
    """
    if not (store / REJECTED).is_file():
        return None
    counts: dict[str, list[int]] = {}
    for _, row in chain(read_lines(store / KEPT), read_lines(store / REJECTED)):
        if row.get("error") is None:
            verdicts = row.get("verdicts") or [{}]
            count = counts.setdefault(str(row.get("prompt_uid")), [0, 0])
            count[0] += verdicts[-1].get("score") == 1.0  # no score is no proof
            count[1] += 1
    return {uid: (right / samples, samples) for uid, (right, samples) in counts.items()}


def card_path(out: Path) -> Path:
    """Return where the card of an exported file is or goes: README.md where the folder is for this file alone.

    Raises:
        UserError: a file stands at either place that is not an earlier export.
    """
    readme, beside = out.with_name("README.md"), out.with_name(f"{out.stem}.card.md")
    for path in (readme, beside):
        if card_of(path) == out.name:
            return path
    if out.exists():
        raise UserError(f"--out {out} exists, and no card beside it says that distill exported it: name another file")
    if not out.parent.exists() or not any(out.parent.iterdir()):
        return readme
    if beside.exists():
        raise UserError(f"{beside} exists and is not the card of {out.name}: name another --out")
    return beside


def dataset_info(out: Path) -> dict[str, Any]:
    """Return LLaMA-Factory's list of the datasets in the folder, with this file among them and the others as they are.

    Raises:
        UserError: the list cannot be read, or another file goes by this name.
    """
    path = out.with_name(DATASET_INFO)
    try:
        listed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, where the dataset would be entered: {error}") from error
    known = listed.get(out.stem, {}) if isinstance(listed, dict) else None
    if not isinstance(known, dict) or known.get("file_name", out.name) != out.name:
        raise UserError(f"{path} has another dataset {out.stem!r}, or is no list of datasets: name another --out")
    entry = {
        "file_name": out.name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    }
    return {**listed, out.stem: entry}


def _check_template(config: ExportConfig, kept: Path, by_prompt: bool) -> TemplateReport | None:
    if config.check_template is None:
        return None
    if by_prompt:
        raise UserError(f"--check-template: {config.format} holds no completion that a template could spoil")
    report = require_template(
        config.check_template,
        ((f"{kept.name} line {number}", row["messages"]) for number, row in _checked(kept)),
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )
    for note in report.notes:
        say(f"{config.check_template}: {note}")
    return report


def _rows(
    kept: Path,
    form: Callable[[Mapping[str, Any]], dict[str, Any] | None],
    by_prompt: bool,
    rates: Mapping[str, tuple[float, int]] | None,
    tally: Tally,
    meter: Meter,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the file, and count what they are made of."""
    for number, row in _checked(kept):
        meter.advance()
        seen = tally.read(row)
        if by_prompt and seen:
            continue
        try:
            made = form(row)
            if made is not None:
                json.dumps(made, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{kept} line {number} holds half of a surrogate pair, which no reader of .jsonl or .parquet takes: "
                "leave it out with distill filter --drop malformed, or mend the prompt"
            ) from error
        except UserError as error:
            raise UserError(f"{kept} line {number}: {error}") from error
        if made is None:
            tally.skipped += 1
            continue
        if rates is not None:
            made["pass_rate"], made["num_samples"] = rates[str(row.get("prompt_uid"))]
        tally.rows += 1
        yield made


def _checked(kept: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the kept rows by line number, each with a prompt, then the assistant's turn, of roles and texts only."""
    for number, row in read_lines(kept):
        try:
            turns = conversation({"messages": row.get("messages")})
            further = {str(key) for turn in turns for key in turn} - {"role", "content"}
            if further:
                raise UserError(f"a message has {', '.join(sorted(further))} beside role and content: no format does")
            if len(turns) < 2:
                raise UserError("there is no prompt before the assistant's turn")
        except UserError as error:
            raise UserError(f"{kept} line {number}: {error}") from error
        yield number, row


def _origin(row: Mapping[str, Any]) -> dict[str, str]:
    """Return columns that say where a row is from; texts, never null: a column has one type, and no trainer's name."""
    return {name: str(row.get(name) or "") for name in ("uid", "source", "gold", "teacher")}


def _write_jsonl(stream: IO[str], rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        stream.write(dump_line(row).translate(LINE_ENDS))


def _write_parquet(stream: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    writer: Any = None
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        table = pa.Table.from_pylist(batch, schema=writer.schema if writer else None)
        writer = writer or parquet.ParquetWriter(stream.buffer, table.schema, compression="zstd")
        writer.write_table(table)
        del batch, table  # else two batches are held while the next is read
    if writer:
        writer.close()


WRITERS: dict[str, Callable[[IO[str], Iterable[Mapping[str, Any]]], None]] = {
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
