"""The teacher's numbers on disk: what was written is read, within a stated error, whatever happened in between."""

from __future__ import annotations

import math
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import RunError, UserError
from distill.signals import SignalReader, SignalSpec, SignalWriter, TokenSignal, signal_stream

VOCABULARIES = (2, 259, 131_073, 151_936, 2**31 - 1, 2**31)
WHOSE: dict[str, Any] = {"vocab_size": 259, "teacher": "nano@0123", "tokenizer": "feed"}
TOP, SAMPLED = SignalSpec("top", 4), SignalSpec("sampled", 7)
ARRAYS = ("token_ids", "token_logprobs", "ids", "logprobs", "counts", "tail")


def make_signal(rng: np.random.Generator, tokens: int, spec: SignalSpec, vocab_size: int) -> TokenSignal:
    """Return a random signal: rows of any fullness, probabilities from next to 1 to next to nothing, ties."""
    ids = np.full((tokens, spec.size), -1)
    logprobs = np.full((tokens, spec.size), -np.inf)
    counts = np.zeros((tokens, spec.size), int)
    token_ids, token_logprobs = np.zeros(tokens, int), np.zeros(tokens)
    for row in range(tokens):
        width = int(rng.integers(spec.kind == "sampled", min(spec.size, vocab_size) + 1))
        chosen = np.array(sorted({int(each) for each in rng.integers(0, vocab_size, 3 * width)})[:width], int)
        if spec.kind == "top" and rng.random() < 0.2:
            chosen[-1:] = vocab_size - 1  # the sets' far end
        width = len(chosen)
        weights = rng.exponential(1.0, width) ** rng.choice([0.0, 1.0, 20.0])
        kept = 1.0 if width == vocab_size else rng.choice([0.5, 0.999999])
        shares = np.log(weights / max(weights.sum(), 1e-300)) + math.log(kept)
        shares = np.maximum(shares, -900).astype(np.float32)
        order = np.lexsort((chosen, -shares))
        ids[row, :width], logprobs[row, :width] = chosen[order], shares[order]
        if spec.kind == "sampled":
            counts[row, :width] = 1 + rng.multinomial(spec.size - width, np.full(width, 1 / width))
        inside = width and rng.random() < 0.7
        place = int(rng.integers(width)) if inside else 0
        outside = int(rng.integers(vocab_size))
        if not inside and outside in chosen:
            inside, place = True, int(np.flatnonzero(ids[row] == outside)[0])
        token_ids[row] = ids[row, place] if inside else outside
        token_logprobs[row] = logprobs[row, place] if inside else rng.choice([-rng.exponential(50.0), -np.inf])
    return TokenSignal(token_ids, token_logprobs, ids, logprobs, counts if spec.kind == "sampled" else None)


def assert_stored(found: TokenSignal, written: TokenSignal, spec: SignalSpec, vocab_size: int = 259) -> None:
    """Ids and counts are exact, the rest is within the bound; the order may change among outcomes about as likely."""
    assert np.array_equal(found.token_ids, written.token_ids)
    width = found.ids.shape[1]
    assert width == max((written.ids >= 0).sum(-1), default=0)
    assert (found.logprobs is not None) == (found.tail is not None) == (found.token_logprobs is not None)
    assert (found.logprobs is not None) == spec.logprobs
    assert (found.counts is not None) == (spec.kind == "sampled")

    def both(name: str) -> list[np.ndarray]:
        """What was written and what was found, by id."""
        orders = [(signal, np.argsort(signal.ids, axis=-1)) for signal in (written, found)]
        return [
            np.take_along_axis(getattr(signal, name), order, -1)[:, order.shape[1] - width :]
            for signal, order in orders
        ]

    assert np.array_equal(*both("ids"))
    if found.counts is not None:
        assert np.array_equal(*both("counts"))
    if spec.logprobs:
        assert_near(*both("logprobs"), spec.error)
        assert_near(written.token_logprobs, found.token_logprobs, spec.error)
        left = np.where((written.ids >= 0).sum(-1) < vocab_size, written.tail, -np.inf)
        assert_near(left, found.tail, 1 / (8 * spec.resolution))


def assert_near(written: np.ndarray, found: np.ndarray, error: float) -> None:
    """Within the error and what float32 rounds off, -inf where it was."""
    assert np.array_equal(np.isneginf(written), np.isneginf(found))
    some = ~np.isneginf(written)
    differences = np.abs(written[some].astype(np.float64) - found[some])
    assert (differences <= error * (1 + 1e-6) - 2.0**-22 * written[some]).all()


def same(one: TokenSignal, other: TokenSignal) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def fill(folder: Path, spec: SignalSpec, lengths: list[int], **changed: Any) -> dict[str, TokenSignal]:
    """Write signals of these lengths and return what is to be read, by uid."""
    whose = {**WHOSE, **changed}
    rng = np.random.default_rng(3)
    written = {f"uid-{n}": make_signal(rng, length, spec, whose["vocab_size"]) for n, length in enumerate(lengths)}
    with SignalWriter(folder, spec, **whose) as writer:
        for uid, signal in written.items():
            writer.append(uid, signal)
    reader = SignalReader(folder)
    for uid, signal in written.items():
        assert_stored(reader[uid], signal, spec)
    return {uid: reader[uid] for uid in reader.uids}


resolutions = st.sampled_from([1, 16, 1024])
specs = st.one_of(
    st.builds(SignalSpec, st.just("top"), st.integers(1, 20), resolution=resolutions),
    st.builds(SignalSpec, st.just("sampled"), st.integers(1, 20), st.booleans(), resolutions),
)


@settings(max_examples=60)
@given(specs, st.sampled_from(VOCABULARIES), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 2**32))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, spec: SignalSpec, vocab_size: int, lengths: list[int], seed: int
) -> None:
    """Any shape, vocabulary, kind and resolution; what was read can be written again."""
    folder = tmp_path_factory.mktemp("signals")
    whose = {**WHOSE, "vocab_size": vocab_size}
    rng = np.random.default_rng(seed)
    written = {f"uid-{n}": make_signal(rng, length, spec, vocab_size) for n, length in enumerate(lengths)}
    with SignalWriter(folder / "once", spec, **whose) as writer, SignalWriter(folder / "again", spec, **whose) as again:
        sizes = [writer.append(uid, signal) for uid, signal in written.items()]
        reader = SignalReader(folder / "once")
        for uid, signal in written.items():
            assert_stored(reader[uid], signal, spec, vocab_size)
            again.append(uid, reader[uid])
        assert sum(sizes) == (folder / "once" / "records.bin").stat().st_size
    assert (reader.uids, len(reader), reader.spec, reader.vocab_size) == ([*written], len(written), spec, vocab_size)
    assert (reader.teacher, reader.tokenizer) == (WHOSE["teacher"], WHOSE["tokenizer"])
    reader.verify()
    second = SignalReader(folder / "again")
    for uid in written:
        assert_stored(second[uid], reader[uid], spec, vocab_size)


@settings(max_examples=30)
@given(specs, st.sampled_from(VOCABULARIES), st.lists(st.integers(0, 30), max_size=4), st.integers(0, 2**32))
def test_gathering_is_padding_what_is_read_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, spec: SignalSpec, vocab_size: int, lengths: list[int], seed: int
) -> None:
    folder, rng = tmp_path_factory.mktemp("signals"), np.random.default_rng(seed)
    with SignalWriter(folder, spec, **{**WHOSE, "vocab_size": vocab_size}) as writer:
        for number, length in enumerate(lengths):
            writer.append(f"uid-{number}", make_signal(rng, length, spec, vocab_size))
    reader = SignalReader(folder)
    uids = [f"uid-{number}" for number in reversed(range(len(lengths)))]
    batch = reader.gather(uids)
    singles = [reader[uid] for uid in uids]
    assert batch.lengths.tolist() == lengths[::-1]
    width = max((each.ids.shape[1] for each in singles), default=0)
    assert batch.ids.shape == (len(lengths), max(lengths, default=0), width)
    empty = {"token_ids": -1, "token_logprobs": -np.inf, "ids": -1, "logprobs": -np.inf, "counts": 0, "tail": 0}
    for name, padding in empty.items():
        padded = getattr(batch, name)
        absent = spec.kind == "top" if name == "counts" else "ids" not in name and not spec.logprobs
        assert (padded is None) == absent
        for row, single in enumerate([] if absent else singles):
            alone = getattr(single, name)
            assert padded.dtype == alone.dtype
            within = tuple(slice(size) for size in alone.shape)
            assert np.array_equal(padded[row][within], alone)
            beyond = np.ones(padded[row].shape, bool)
            beyond[within] = False
            assert (padded[row][beyond] == padding).all()


@pytest.mark.parametrize("resolution", [1, 16, 1024])
def test_the_error_of_storing_a_log_probability(tmp_path: Path, resolution: int) -> None:
    """The bound of `SignalSpec.error` holds, is not twice too large, and the mean is about a quarter of a step."""
    rng, spec = np.random.default_rng(0), SignalSpec("top", 8, resolution=resolution)
    weights = rng.dirichlet(np.full(200, 0.3), 4000) + 1e-9
    logprobs = np.sort(np.log(weights / weights.sum(-1, keepdims=True)))[:, ::-1][:, :8].astype(np.float32)
    ids = np.tile(np.arange(8), (4000, 1))
    signal = TokenSignal(np.zeros(4000), logprobs[:, 0], ids, logprobs)
    with SignalWriter(tmp_path, spec, **WHOSE) as writer:
        writer.append("uid", signal)
    found = SignalReader(tmp_path)["uid"]
    by_id = np.take_along_axis(found.logprobs, np.argsort(found.ids, -1), -1).astype(np.float64)
    errors = np.abs(by_id - logprobs)
    assert 0.5 * spec.error < errors.max() <= spec.error * (1 + 1e-6) + 1e-5
    assert errors.mean() == pytest.approx(0.27 / resolution, rel=0.2)


@pytest.mark.parametrize("tail", [0.9999999, 0.5, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("resolution", [4, 16])
def test_what_the_outcomes_leave_over_survives(tmp_path: Path, tail: float, resolution: int) -> None:
    """However coarse the steps are: the rest of a confident teacher, and the part that is kept of an unsure one."""
    spec = SignalSpec("top", 3, resolution=resolution)
    shares = np.array([[0.97, 0.02999, 0.00001], [0.5, 0.3, 0.2], [1, 0, 0]]) * (1 - tail)
    ids = np.array([[3, 2, 1], [3, 2, 1], [3, -1, -1]])
    with np.errstate(divide="ignore"):
        logprobs, left = np.log(shares), np.full(3, np.log(tail))
    with SignalWriter(tmp_path, spec, **WHOSE) as writer:
        writer.append("uid", TokenSignal(np.full(3, 3), logprobs[:, 0], ids, logprobs, tail=left))
    batch = SignalReader(tmp_path).gather(["uid"])
    rest, kept = np.exp(batch.tail[0].astype(np.float64)), np.exp(batch.logprobs[0].astype(np.float64)).sum(-1)
    assert rest == pytest.approx(np.full(3, tail), rel=1 / (8 * resolution) + 1e-5)
    assert kept == pytest.approx(np.full(3, 1 - tail), rel=1 / (8 * resolution) + 1e-5)
    assert kept + rest == pytest.approx(np.ones(3), abs=1e-6)


def test_a_whole_vocabulary_leaves_nothing_over(tmp_path: Path) -> None:
    """Though in float32 its probabilities do not quite add up to 1: a student gives the rest no probability at all."""
    logprobs = np.log([[0.7, 0.2, 0.0999], [0.6, 0.3, 0.05]])
    signal = TokenSignal([1, 2], logprobs[[0, 1], [1, 2]], [[0, 1, 2], [0, 1, 2]], logprobs)
    for vocab_size, left in ((3, [-np.inf, math.log(0.05)]), (4, [math.log(0.0001), math.log(0.05)])):
        folder = tmp_path / str(vocab_size)
        with SignalWriter(folder, SignalSpec("top", 3), **{**WHOSE, "vocab_size": vocab_size}) as writer:
            writer.append("uid", signal)
        assert SignalReader(folder)["uid"].tail == pytest.approx(left, abs=0.01)


def test_extremes_of_a_log_probability(tmp_path: Path) -> None:
    """Below -1024 nats all is one; an own token that cannot be stays so; a row of nothing leaves everything over."""
    lowest = [[-1e-9, -1500.0, -1e30], [-2000.0, -3000.0, -np.inf], [-np.inf] * 3]
    ids = [[5, 3, 2], [3, 1, -1], [-1, -1, -1]]
    signal = TokenSignal([7, 3, 7], [-np.inf, -2000.0, -1e9], ids, lowest)
    with SignalWriter(tmp_path, SignalSpec("top", 3), **WHOSE) as writer:
        writer.append("uid", signal)
    found = SignalReader(tmp_path)["uid"]
    assert found.token_logprobs.tolist() == [-math.inf, pytest.approx(-1024, abs=1), -1024]
    assert found.tail[1:].tolist() == [0, 0]
    assert found.ids.tolist() == [[5, 2, 3], [1, 3, -1], [-1, -1, -1]]
    assert found.logprobs[0].tolist() == [pytest.approx(0, abs=1e-8), -1024, -1024]
    assert found.logprobs[1, :2] == pytest.approx(-1024, abs=1)


def as_in_text(rng: np.random.Generator, tokens: int, count: int, vocab_size: int) -> np.ndarray:
    """Return a set of ids per token (T, K) whose frequencies fall like those of words."""
    keys = rng.gumbel(size=(tokens, vocab_size)) - 1.3 * np.log(np.arange(vocab_size) + 3.0)
    return rng.permutation(vocab_size)[np.argpartition(-keys, count)[:, :count]]


@pytest.mark.parametrize(("count", "vocab_size"), [(8, 30_000), (50, 30_000), (12, 151_936)])
@pytest.mark.parametrize("uniform", [False, True])
def test_ids_take_fewer_bytes_than_a_code_of_arbitrary_sets(
    tmp_path: Path, count: int, vocab_size: int, uniform: bool
) -> None:
    """Less than the sets' information where ids come back as words do; hardly more where none ever does."""
    rng, tokens = np.random.default_rng(0), 100
    drawn = [rng.choice(vocab_size, count, replace=False) for _ in range(tokens)] if uniform else None
    ids = np.sort(np.stack(drawn) if drawn else as_in_text(rng, tokens, count, vocab_size))
    signal = TokenSignal(ids[:, 0], None, ids, None, np.ones_like(ids))
    spec, whose = SignalSpec("sampled", count, logprobs=False), {**WHOSE, "vocab_size": vocab_size}
    with SignalWriter(tmp_path, spec, **whose) as writer:
        size = writer.append("uid", signal)
    assert np.array_equal(SignalReader(tmp_path)["uid"].ids, ids)
    bound = tokens * math.log2(math.comb(vocab_size, count)) / 8
    counts_and_own, head = tokens * count / 8, 40
    assert size <= (1.18 if uniform else 0.9) * bound + counts_and_own + head


def test_draws_take_less_without_log_probabilities(tmp_path: Path) -> None:
    """What is captured has them all the same: the folder keeps what it was made for."""
    signal, sizes = make_signal(np.random.default_rng(0), 300, SAMPLED, 259), []
    for number, logprobs in enumerate((True, False)):
        spec = SignalSpec("sampled", 7, logprobs=logprobs)
        with SignalWriter(tmp_path / str(number), spec, **WHOSE) as writer:
            sizes.append(writer.append("uid", signal))
        assert_stored(SignalReader(tmp_path / str(number))["uid"], signal, spec)
    assert sizes[1] < 0.7 * sizes[0]


def test_a_torn_record_is_cut_off_and_only_it(tmp_path: Path) -> None:
    """The last record cut at every one of its bytes: the others stay, and it can be written again."""
    folder = tmp_path / "signal"
    written = fill(folder, TOP, [3, 0, 5, 2])
    records = (folder / "records.bin").read_bytes()
    last = SignalReader(folder).offsets["uid-3"]
    for length in range(last, len(records)):
        (folder / "records.bin").write_bytes(records[:length])
        reader = SignalReader(folder)  # may look before the next writer mends
        assert reader.uids == ["uid-0", "uid-1", "uid-2"]
        reader.verify()
        with SignalWriter(folder, TOP, **WHOSE) as writer:
            assert writer.torn_bytes == length - last
            assert "uid-3" not in writer
            writer.append("uid-3", written["uid-3"])
        assert (folder / "records.bin").read_bytes() == records


def test_a_power_cut_leaves_zeros_or_half_a_content(tmp_path: Path) -> None:
    """A file that has its length but not its bytes: zeros, and a last record that fails its checksum, are cut off."""
    folder = tmp_path / "signal"
    fill(folder, SAMPLED, [3, 4, 5])
    records, last = (folder / "records.bin").read_bytes(), SignalReader(folder).offsets["uid-2"]
    for damaged, left in ((records + bytes(500), 3), (records[:-20] + bytes(20), 2), (records[:last] + bytes(80), 2)):
        for with_index in (True, False):
            (folder / "records.bin").write_bytes(damaged)
            if not with_index:
                (folder / "index.json").unlink()
            with SignalWriter(folder, SAMPLED, **WHOSE) as writer:
                assert len(writer) == left
            SignalReader(folder).verify()
            assert (folder / "records.bin").read_bytes() == records[: len(records) if left == 3 else last]


def test_the_last_record_of_a_trace_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first, second = make_signal(rng, 4, TOP, 259), make_signal(rng, 6, TOP, 259)
    with SignalWriter(tmp_path, TOP, **WHOSE) as writer:
        writer.append("a", first)
        writer.append("b", first)
        writer.append("a", second)
    reader = SignalReader(tmp_path)
    assert reader.uids == ["a", "b"]
    assert_stored(reader["a"], second, TOP)
    reader.verify()
    (tmp_path / "index.json").unlink()
    assert_stored(SignalReader(tmp_path)["a"], second, TOP)


def test_the_index_is_made_anew_when_missing_behind_or_damaged(tmp_path: Path) -> None:
    written = fill(tmp_path / "whole", TOP, [3, 4, 5])
    index = tmp_path / "whole" / "index.json"
    behind = index.read_bytes()
    with SignalWriter(tmp_path / "whole", TOP, **WHOSE) as writer:
        writer.append("late", written["uid-0"])
    for content in (None, b"", b"[]", b"{", behind, behind.replace(b"uid-1", b"uid-7")):
        index.unlink() if content is None else index.write_bytes(content)
        reader = SignalReader(tmp_path / "whole")
        assert reader.uids == ["uid-0", "uid-1", "uid-2", "late"]
        reader.verify()
        assert all(same(reader[uid], signal) for uid, signal in written.items())


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    fill(folder, SAMPLED, [5, 0, 9])
    return folder


@settings(max_examples=150)
@given(st.data())
def test_a_flipped_bit_is_found(intact: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Anywhere in the records or the header it is an error that names the file; a damaged index is made anew."""
    folder = tmp_path_factory.mktemp("flipped") / "signal"
    shutil.copytree(intact, folder)
    name = data.draw(st.sampled_from(["records.bin", "header.json", "index.json"]))
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    if name == "index.json":
        found, before = SignalReader(folder), SignalReader(intact)
        found.verify()
        assert found.uids == before.uids
        assert all(same(found[uid], before[uid]) for uid in before.uids)
        return
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        SignalReader(folder).verify()


def test_a_damaged_record_is_named_and_its_neighbours_are_read(tmp_path: Path) -> None:
    fill(tmp_path, TOP, [5, 6, 7])
    offsets = SignalReader(tmp_path).offsets
    content = bytearray((tmp_path / "records.bin").read_bytes())
    content[offsets["uid-2"] - 1] ^= 4
    (tmp_path / "records.bin").write_bytes(content)
    reader = SignalReader(tmp_path)
    for refused in (reader.verify, lambda: reader["uid-1"], lambda: reader.gather(["uid-0", "uid-1"])):
        with pytest.raises(UserError, match=r"records\.bin is damaged .*'uid-1'"):
            refused()
    assert len(reader["uid-0"]) == 5
    assert len(reader["uid-2"]) == 7
    with pytest.raises(KeyError):
        reader["uid-9"]


@pytest.mark.parametrize(
    ("spec", "changed"),
    [
        (SignalSpec("top", 5), {}),
        (SignalSpec("sampled", 4), {}),
        (SignalSpec("top", 4, resolution=32), {}),
        (TOP, {"vocab_size": 260}),
        (TOP, {"teacher": "another"}),
        (TOP, {"tokenizer": "beef"}),
    ],
)
def test_a_folder_holds_one_kind_of_numbers(tmp_path: Path, spec: SignalSpec, changed: dict[str, Any]) -> None:
    """What differs is named, and nothing is touched; a folder that holds nothing yet may be bound anew."""
    fill(tmp_path / "used", TOP, [3])
    before = {path.name: path.read_bytes() for path in (tmp_path / "used").iterdir()}
    differing = next(
        iter(changed), next((name for name, value in asdict(TOP).items() if getattr(spec, name) != value), "")
    )
    with pytest.raises(UserError, match=rf"holds other numbers \({differing} is .* there and .* here\).*--out"):
        SignalWriter(tmp_path / "used", spec, **{**WHOSE, **changed})
    assert {path.name: path.read_bytes() for path in (tmp_path / "used").iterdir()} == before
    fill(tmp_path / "empty", TOP, [])
    assert fill(tmp_path / "empty", spec, [2], **changed)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with SignalWriter(tmp_path, TOP, **WHOSE), pytest.raises(UserError, match="another process is writing"):
        SignalWriter(tmp_path, TOP, **WHOSE)
    SignalWriter(tmp_path, TOP, **WHOSE).close()


def test_reading_while_it_is_written(tmp_path: Path) -> None:
    signal = make_signal(np.random.default_rng(0), 5, TOP, 259)
    with SignalWriter(tmp_path, TOP, **WHOSE) as writer:
        assert SignalReader(tmp_path).uids == []
        writer.append("a", signal)
        reader = SignalReader(tmp_path)
        writer.append("b", signal)
        assert reader.uids == ["a"]
        assert_stored(reader["a"], signal, TOP)
        assert SignalReader(tmp_path).uids == ["a", "b"]


def test_what_is_no_folder_of_signals_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no signals: it has no header\.json"):
        SignalReader(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use"):
        SignalWriter(tmp_path / "file" / "signal", TOP, **WHOSE)
    with pytest.raises(UserError, match=r"1 to 2\^31 tokens"):
        SignalWriter(tmp_path / "wide", TOP, **{**WHOSE, "vocab_size": 2**31 + 1})
    invalid = (("top", 3, False), ("top", 3, True, 0), ("top", 3, True, 1025), ("top", 3, True, 2.5))
    for wrong in (("top", 0), ("best", 3), ("sampled", True), *invalid):
        with pytest.raises(UserError):
            SignalSpec(*wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("other", "remedy"), [(1, "remove .* and score the traces again"), (3, "update distill")])
def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: int, remedy: str) -> None:
    fill(tmp_path, TOP, [3])
    monkeypatch.setattr("distill.signal_folder.FORMAT", other)
    with pytest.raises(UserError, match=f"format 2, this version reads {other}"):
        SignalReader(tmp_path)
    monkeypatch.setattr("distill.signals.FORMAT", other)
    fill(tmp_path / "other", TOP, [3])
    monkeypatch.undo()
    for opened in (SignalReader, lambda folder: SignalWriter(folder, TOP, **WHOSE)):
        with pytest.raises(UserError, match=f"format {other}, this version reads 2: {remedy}"):
            opened(tmp_path / "other")


def test_a_full_disk_costs_the_record_that_did_not_fit(tmp_path: Path) -> None:
    """As in the journal: one line says so, half a record is cut off, and what was there can be read."""
    rng = np.random.default_rng(0)
    small, large = make_signal(rng, 5, TOP, 259), make_signal(rng, 4000, TOP, 259)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = SignalWriter(tmp_path, TOP, **WHOSE)
    size = writer.append("small", small)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write .*records\.bin: .*run the same command again"):
            writer.append("large", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "records.bin").stat().st_size == size
    assert "large" not in writer
    writer.append("large", large)
    writer.close()
    reader = SignalReader(tmp_path)
    reader.verify()
    assert_stored(reader["small"], small, TOP)
    assert_stored(reader["large"], large, TOP)


def _valid() -> dict[str, Any]:
    return {
        "token_ids": [5, 9],
        "token_logprobs": [-0.5, -7.0],
        "ids": [[5, 2], [4, -1]],
        "logprobs": [[-0.5, -1.5], [-0.1, -math.inf]],
        "counts": [[2, 1], [3, 0]],
    }


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"token_ids": [5]}, "shapes"),
        ({"logprobs": [[-0.5], [-0.1]]}, "shapes"),
        ({"counts": [[3], [3]]}, "shape"),
        ({"token_ids": [5, -1]}, "negative"),
        ({"token_logprobs": [-0.5, math.nan]}, "NaN"),
        ({"token_logprobs": [-0.5, 0.5]}, "positive"),
        ({"logprobs": [[-0.5, math.nan], [-0.1, -math.inf]]}, "NaN"),
        ({"logprobs": [[-0.5, -math.inf], [-0.1, -math.inf]]}, "-inf"),
        ({"logprobs": [[-0.5, -1.5], [-0.1, -3.0]]}, "-inf"),
        ({"ids": [[5, 2], [-1, 4]], "logprobs": [[-0.5, -1.5], [-math.inf, -0.1]]}, "empty place before"),
        ({"logprobs": [[-0.5, -0.6], [-0.1, -math.inf]]}, "more than 1"),
        ({"logprobs": [[-1.5, -0.5], [-0.1, -math.inf]], "token_logprobs": [-1.5, -7.0]}, "not sorted"),
        ({"logprobs": [[-1.5, -1.5], [-0.1, -math.inf]], "token_logprobs": [-1.5, -7.0]}, "not sorted"),
        ({"ids": [[5, 5], [4, -1]]}, "there twice"),
        ({"counts": [[2, 0], [3, 0]]}, "count of 0"),
        ({"token_logprobs": [-0.7, -7.0]}, "another log-probability"),
        ({"token_logprobs": None}, "without these"),
        ({"logprobs": None}, "without these"),
        ({"logprobs": None, "token_logprobs": None, "counts": None}, "a number of each id"),
        ({"logprobs": None, "token_logprobs": None, "counts": [[1, 2], [3, 0]]}, "not sorted"),
        ({"tail": [-2.0, -9.0]}, "do not add up to 1"),
    ],
)
def test_numbers_that_are_no_signal_are_refused(changes: dict[str, Any], fault: str) -> None:
    TokenSignal(**_valid())
    with pytest.raises(ValueError, match=fault):
        TokenSignal(**{**_valid(), **changes})


def test_a_signal_of_another_kind_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with SignalWriter(tmp_path / "top", TOP, **WHOSE) as top, SignalWriter(tmp_path / "s", SAMPLED, **WHOSE) as sampled:
        for writer, signal, fault in (
            (top, make_signal(rng, 3, SAMPLED, 259), "other kind"),
            (sampled, make_signal(rng, 3, TOP, 259), "other kind"),
            (sampled, TokenSignal([1], None, [[3]], None, [[7]]), "has none"),
            (top, make_signal(rng, 30, SignalSpec("top", 9), 259), "more than 4 outcomes"),
            (sampled, make_signal(rng, 3, SignalSpec("sampled", 6), 259), "add up to 7"),
            (top, make_signal(rng, 30, TOP, 300), r"token id 2\d\d in a vocabulary of 259"),
        ):
            with pytest.raises(ValueError, match=fault):
                writer.append("uid", signal)
        with pytest.raises(ValueError, match="uid"):
            top.append("", make_signal(rng, 3, TOP, 259))
        assert len(top) == len(sampled) == 0


def test_a_stream_is_a_traces_own() -> None:
    """The same uid gives the same numbers however they are asked for in pieces; another uid gives others."""
    whole = signal_stream("a").random((6, 5))
    stream = signal_stream("a")
    assert np.array_equal(whole, np.stack([stream.random(5) for _ in range(6)]))
    assert not np.isin(signal_stream("b").random(30), whole).any()


def test_signals_load_no_torch() -> None:
    code = "import sys, distill.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
