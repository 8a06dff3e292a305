"""The trace store: what was written survives torn lines, full disks and a second writer, and its views add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.errors import RunError, UserError
from distill.records import Judgement, Trace, Verdict
from distill.store import (
    FUNNEL,
    JOURNAL,
    KEPT,
    MANIFEST,
    REJECTED,
    TraceStore,
    as_conversation,
    dump_line,
    latest,
    mend,
    read_lines,
    read_manifest,
    read_traces,
    replacing,
    write_json,
    write_views,
)

ROOT = Path(__file__).resolve().parents[1]
ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=20)
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def trace(index: int, *, completion: str = "<think>1+1</think>2", error: str | None = None, **changes: Any) -> Trace:
    """Return sample `index` of a prompt of its own."""
    return replace(
        Trace(
            uid=f"u{index}",
            prompt_uid=f"p{index}",
            messages=({"role": "user", "content": "1+1?"},),
            completion=completion,
            reasoning="1+1",
            answer="2",
            finish_reason="error" if error else "stop",
            num_prompt_tokens=3,
            num_completion_tokens=5,
            sample_index=0,
            seed=index,
            teacher="t",
            backend="b",
            error=error,
        ),
        **changes,
    )


def fill(folder: Path, traces: Sequence[Trace]) -> None:
    """Append traces to the store at `folder`."""
    with TraceStore(folder) as store:
        for one in traces:
            store.append(one)


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in another process, with this module importable as `helpers`."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@given(texts=st.lists(ANY_TEXT, max_size=5))
@in_one_folder
def test_what_is_appended_is_read_in_order(tmp_path: Path, texts: list[str]) -> None:
    folder = tmp_path / "s"
    (folder / JOURNAL).unlink(missing_ok=True)
    traces = [trace(index, completion=text) for index, text in enumerate(texts)]
    fill(folder, traces)
    assert list(read_traces(folder)) == traces
    assert list(read_traces(folder / JOURNAL)) == traces


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=3), data=st.data())
@in_one_folder
def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path: Path, texts: list[str], data: st.DataObject) -> None:
    folder = tmp_path / "s"
    (folder / JOURNAL).unlink(missing_ok=True)
    traces = [trace(index, completion=text) for index, text in enumerate(texts)]
    fill(folder, traces)
    written = (folder / JOURNAL).read_bytes()
    cut = data.draw(st.integers(0, len(written)))
    (folder / JOURNAL).write_bytes(written[:cut])
    whole = written[:cut].count(b"\n")
    assert list(read_traces(folder)) == traces[:whole]  # a reader beside a writer sees whole lines only
    with TraceStore(folder) as store:
        assert store.torn_bytes == cut - (written.rfind(b"\n", 0, cut) + 1)
        for one in traces[whole:]:
            store.append(one)
    assert list(read_traces(folder)) == traces
    assert (folder / JOURNAL).read_bytes() == written


@pytest.mark.parametrize("torn", [0, 1, 65535, 65536, 65537, 200_000])
def test_mending_finds_the_last_line_end_however_far_back(tmp_path: Path, torn: int) -> None:
    path = tmp_path / JOURNAL
    path.write_bytes(b'{"a": 1}\n' + b"x" * torn)
    assert mend(path) == torn
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"x" * torn)
    assert mend(path) == torn
    assert path.read_bytes() == b""


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from distill.errors import UserError
from distill.store import TraceStore
try:
    TraceStore(Path(sys.argv[1])).close()
except UserError as error:
    print(error)
"""
    with TraceStore(tmp_path / "s"):
        refused = child(code, tmp_path / "s")
    assert refused.stdout.startswith(f"another process is writing to {tmp_path / 's'}")
    assert refused.stdout.count("\n") == 1
    assert child(code, tmp_path / "s").stdout == ""


def test_a_killed_writer_leaves_its_lines_and_no_lock(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from distill.store import TraceStore
from test_store import trace
store = TraceStore(Path(sys.argv[1]))
for index in range(3):
    store.append(trace(index))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert child(code, tmp_path / "s").returncode == -9
    fill(tmp_path / "s", [trace(3)])
    assert list(read_traces(tmp_path / "s")) == [trace(index) for index in range(4)]


FULL_DISK = """
import resource, sys
from pathlib import Path
from distill.errors import RunError
from distill.store import TraceStore
from test_store import trace
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
with TraceStore(folder) as store:
    store.append(trace(0))
    store.append(trace(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + limit,) * 2)
    for _ in range(2):
        try:
            store.append(trace(2, completion="x" * 20_000))
        except RunError as error:
            print(error)
    store.append(trace(3, completion=""))
"""


@pytest.mark.parametrize("left", [500, 15_000])
def test_a_full_disk_loses_no_finished_sample_and_leaves_no_half_line(tmp_path: Path, left: int) -> None:
    """A write that the system cuts off in its middle (here by a file size limit), twice, and then a line that fits."""
    done = child(FULL_DISK, tmp_path / "s", left)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith(
        f"cannot write {tmp_path / 's' / JOURNAL}: File too large; everything finished before is kept"
    )
    assert list(read_traces(tmp_path / "s")) == [trace(0), trace(1), trace(3, completion="")]
    fill(tmp_path / "s", [trace(2)])
    assert len(list(read_traces(tmp_path / "s"))) == 4


def test_a_full_disk_leaves_the_old_view(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from distill.errors import RunError
from distill.store import replacing
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for size in (2_000, 2_000_000):  # refused at the last flush, and in the middle of the block
    try:
        with replacing(Path(sys.argv[1])) as stream:
            for _ in range(size // 100):
                stream.write("x" * 100)
    except RunError as error:
        print(error)
"""
    path = tmp_path / KEPT
    path.write_text("old\n")
    done = child(code, path)
    assert (
        done.stdout.splitlines()
        == [f"cannot write {path}: File too large; everything finished before is kept, run the same command again"] * 2
    ), done.stderr
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def write(path: Path, text: str, *, full: bool = False) -> None:
    """Replace a file; with `full`, every write from here on meets a device without space."""
    with replacing(path) as stream:
        stream.write(text)
        if full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), stream.fileno())


def test_no_space_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"view: no space left on the disk; .* run the same command again"):
        write(tmp_path / "view", "x", full=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*view: No such file or directory"):
        write(tmp_path / "absent" / "view", "x")


def test_an_error_inside_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "view"
    write(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as stream:
        stream.write(str(1 / 0))
    with pytest.raises(UnicodeEncodeError):
        write(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{nonsense}", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"", "is not JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"{}", "is not a trace: 'messages'"),
        (b'{"messages": []}', "is not a trace: .*missing"),
        (json.dumps({**trace(1).to_json(), "verdicts": ["x"]}).encode(), "is not a trace: a Verdict must be an object"),
        (json.dumps({**trace(1).to_json(), "verdicts": 1}).encode(), "is not a trace"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named_by_number(tmp_path: Path, line: bytes, fault: str) -> None:
    fill(tmp_path, [trace(0), trace(2)])
    first, last = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(first + line + b"\n" + last)
    with pytest.raises(UserError, match=rf"{JOURNAL} line 2 {fault}"):
        list(read_traces(tmp_path))


@pytest.mark.parametrize("name", ["absent", "absent-v1.2", "folder"])
def test_reading_what_is_no_store(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"{name} is not a trace store: it has no {JOURNAL}"):
        list(read_traces(tmp_path / name))


def test_an_output_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot use .*file as the output folder"):
        TraceStore(tmp_path / "file")
    (tmp_path / "s" / JOURNAL).mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot use .*s as the output folder"):
        TraceStore(tmp_path / "s")


def test_read_lines_skips_blank_lines_and_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_lines(path)) == [(1, {"a": 1}), (4, {"a": 2})]
    path.write_bytes(b'{"a": 1}\n\n{"a": 2\n')
    with pytest.raises(UserError, match="line 3 is not JSON"):
        list(read_lines(path))
    with pytest.raises(UserError, match=r"cannot read .*absent.jsonl: No such file"):
        list(read_lines(tmp_path / "absent.jsonl"))


@given(text=ANY_TEXT)
def test_a_line_is_one_line_of_utf8_whatever_the_text(text: str) -> None:
    line = dump_line({"text": text, text: 1}).encode("utf-8")
    assert line.index(b"\n") == len(line) - 1
    assert json.loads(line) == {"text": text, text: 1}


def test_a_recipe_with_samples_owns_its_folder(tmp_path: Path) -> None:
    recipe = {"prompts": "a.jsonl", "sampling": {"temperature": 0.6, "top_p": 0.95}, "seed": 0}
    with TraceStore(tmp_path) as store:
        store.claim(recipe, teacher_model="here")
        store.append(trace(0))
        store.claim(recipe, teacher_model="moved")
    assert read_manifest(tmp_path) == {"recipe": recipe, "teacher_model": "here"}
    with TraceStore(tmp_path) as store:
        store.claim(recipe)
        other = {**recipe, "seed": 1, "sampling": {"temperature": 0.7, "top_p": 0.95}}
        with pytest.raises(UserError) as refused:
            store.claim(other)
    message = str(refused.value)
    assert "seed is 0 there and 1 here" in message
    assert "'temperature': 0.6" in message
    assert "prompts" not in message
    assert read_manifest(tmp_path)["recipe"] == recipe


def test_a_recipe_that_drew_nothing_gives_its_folder_up(tmp_path: Path) -> None:
    with TraceStore(tmp_path) as store:
        store.claim({"seed": 0})
    with TraceStore(tmp_path) as store:
        store.claim({"seed": 1})
    assert read_manifest(tmp_path)["recipe"] == {"seed": 1}


def test_a_folder_of_something_else_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with TraceStore(tmp_path) as store, pytest.raises(UserError, match=r"files of something else \(precious\.txt\)"):
        store.claim({"seed": 0})
    assert not (tmp_path / MANIFEST).exists()
    with TraceStore(tmp_path) as store:
        store.claim({"seed": 0}, own=("precious.txt",))


def test_what_a_killed_run_was_writing_is_swept_away(tmp_path: Path) -> None:
    for name in (MANIFEST, KEPT):
        (tmp_path / f".{name}.12345").write_text("half")
    with TraceStore(tmp_path) as store:
        store.claim({"seed": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", MANIFEST, JOURNAL]


def test_samples_without_a_manifest_are_not_claimed(tmp_path: Path) -> None:
    fill(tmp_path, [trace(0)])
    with TraceStore(tmp_path) as store, pytest.raises(UserError, match=f"has samples but no {MANIFEST}"):
        store.claim({"seed": 0})
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with TraceStore(tmp_path) as store, pytest.raises(UserError, match=MANIFEST):
        store.claim({"seed": 0})
    assert (tmp_path / MANIFEST).read_text() == content


OUTCOMES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["fails", "kept", "wrong", "wrong and truncated"])), max_size=12
)


@given(outcomes=OUTCOMES)
@in_one_folder
def test_the_views_add_up(tmp_path: Path, outcomes: list[tuple[int, str]]) -> None:
    """Any history of samples, failed ones drawn again: each uid counts once, by its last line."""
    (tmp_path / JOURNAL).unlink(missing_ok=True)
    last = dict(outcomes)
    fill(tmp_path, [trace(uid, answer=what, error="dead" if what == "fails" else None) for uid, what in outcomes])
    assert {t.uid: t.answer for t in latest(tmp_path)} == {f"u{uid}": what for uid, what in last.items()}
    reasons = {"kept": (), "wrong": ("wrong",), "wrong and truncated": ("truncated", "wrong")}
    funnel = write_views(tmp_path, tmp_path, lambda t: Judgement(reasons[t.answer], (t.answer,)), {"seen": 7})
    kept = [row for _, row in read_lines(tmp_path / KEPT)]
    rejected = [row for _, row in read_lines(tmp_path / REJECTED)]
    counts = Counter(last.values())
    assert funnel == json.loads((tmp_path / FUNNEL).read_text())
    assert funnel["samples"] == len(last) == len(kept) + len(rejected)
    assert funnel["kept"] == len(kept) == counts["kept"]
    assert sum(funnel["rejected"].values()) == len(rejected)
    first = {"failed": counts["fails"], "wrong": counts["wrong"], "truncated": counts["wrong and truncated"]}
    assert funnel["rejected"] == {reason: count for reason, count in first.items() if count}
    every = Counter(reason for row in rejected for reason in row["reasons"])
    assert funnel["reasons"] == dict(every)
    assert every["wrong"] == counts["wrong"] + counts["wrong and truncated"]
    assert {row["uid"] for row in kept}.isdisjoint(row["uid"] for row in rejected)
    del counts["fails"]
    flags = {answer: {"samples": n, "kept": n * (answer == "kept")} for answer, n in counts.items()}
    assert (funnel["flags"], funnel["seen"]) == (flags, 7)
    assert all(json.loads(row["flags"]) == ["kept"] for row in kept)


def test_rejected_lines_are_traces_with_reasons(tmp_path: Path) -> None:
    fill(tmp_path, [trace(0, gold="2")])
    write_views(tmp_path, tmp_path, lambda _: Judgement(("wrong",)))
    ((_, row),) = read_lines(tmp_path / REJECTED)
    assert row.pop("reasons") == ["wrong"]
    assert Trace.from_json(row) == trace(0, gold="2")


def test_views_can_be_written_elsewhere(tmp_path: Path) -> None:
    fill(tmp_path / "s", [trace(0)])
    (tmp_path / "v").mkdir()
    write_views(tmp_path / "s", tmp_path / "v", lambda _: Judgement())
    assert [row["uid"] for _, row in read_lines(tmp_path / "v" / KEPT)] == ["u0"]
    assert not (tmp_path / "s" / KEPT).exists()
    assert list(read_traces(tmp_path / "s")) == [trace(0)]


def test_replacing_the_journal_reads_the_old_one_and_goes_on_appending(tmp_path: Path) -> None:
    with TraceStore(tmp_path) as store:
        for index in range(3):
            store.append(trace(index))
        store.replace_journal(replace(t, gold="2") for t in read_traces(tmp_path))
        store.append(trace(3))
    assert list(read_traces(tmp_path)) == [*(trace(index, gold="2") for index in range(3)), trace(3)]


def test_a_failed_replacement_keeps_the_journal(tmp_path: Path) -> None:
    def failing() -> Any:
        yield trace(7)
        raise ZeroDivisionError

    with TraceStore(tmp_path) as store:
        store.append(trace(0))
        with pytest.raises(ZeroDivisionError):
            store.replace_journal(failing())
        store.append(trace(1))
    assert list(read_traces(tmp_path)) == [trace(0), trace(1)]


def test_kept_lines_are_conversations_without_a_completion_column() -> None:
    row = as_conversation(trace(0, completion="<think>1+1</think>2", gold="2", meta={"level": 3}))
    assert row["messages"] == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>1+1</think>2"},
    ]
    assert {"completion", "prompt", "error"}.isdisjoint(row)  # trainers look at these names
    assert row["gold"] == "2"
    assert json.loads(row["meta"]) == {"level": 3}


def test_kept_lines_load_as_one_table_though_the_first_lack_what_the_later_have(tmp_path: Path) -> None:
    """Arrow's reader takes the column types from the file's first 10 MB and fails on what comes later."""
    import datasets

    bare = Verdict(verifier="mine:f", version="", score=1.0)
    plain = trace(0, completion="x" * 100_000, verdicts=(bare,))
    full = replace(bare, predicted="2", reason="equal")
    late = trace(1, gold="2", predicted="2", verdicts=(full,), flags=("odd",), source="a:1", meta={"level": 3})
    with TraceStore(tmp_path) as store:
        for index in range(110):
            store.append(replace(plain, uid=f"plain{index}"))
        store.append(late)
    write_views(tmp_path, tmp_path, lambda _: Judgement())
    assert (tmp_path / KEPT).stat().st_size > 10 << 20
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / KEPT), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == 111
    assert table[110]["gold"] == table[110]["predicted"] == "2"
    assert table[110]["verdicts"][0]["predicted"] == "2"
    assert [turn["role"] for turn in table[0]["messages"]] == ["user", "assistant"]


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"text": "\ud800é"})
    assert json.loads(path.read_bytes()) == {"text": "\ud800é"}
    with pytest.raises(TypeError):
        write_json(path, {"text": object()})
    assert json.loads(path.read_bytes()) == {"text": "\ud800é"}
    assert list(tmp_path.iterdir()) == [path]
