"""The teacher's numbers on disk: what was written is read, within a stated error, whatever happened in between."""

from __future__ import annotations

import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import RunError, UserError
from distill.signal_bits import _read_elias_fano as read_elias_fano
from distill.signal_bits import dequantise, elias_fano, pack, quantisation_error, quantise, unpack
from distill.signals import SignalReader, SignalSpec, SignalWriter, TokenSignal, signal_stream

VOCABULARIES = (2, 259, 131_073, 151_936, 2**31 - 1, 2**31)
WHOSE: dict[str, Any] = {"vocab_size": 259, "teacher": "nano@0123", "tokenizer": "feed"}
TOP, SAMPLED = SignalSpec("top", 4), SignalSpec("sampled", 7)


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
        shares = np.log(weights / max(weights.sum(), 1e-300)) + math.log(rng.choice([0.5, 0.999999]))
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
        token_logprobs[row] = logprobs[row, place] if inside else -rng.exponential(50.0)
    return TokenSignal(token_ids, token_logprobs, ids, logprobs, counts if spec.kind == "sampled" else None)


def assert_stored(found: TokenSignal, written: TokenSignal) -> None:
    """Everything is exact but the log-probabilities, which are within the bound; the order may change among equals."""
    assert np.array_equal(found.token_ids, written.token_ids)
    bound = quantisation_error(written.token_logprobs)
    assert (np.abs(found.token_logprobs - written.token_logprobs) <= bound).all()
    assert found.ids.shape[1] == max((written.ids >= 0).sum(-1), default=0)
    for row in range(len(written)):
        kept = {int(i): place for place, i in enumerate(written.ids[row]) if i >= 0}
        there = {int(i): place for place, i in enumerate(found.ids[row]) if i >= 0}
        assert set(there) == set(kept)
        for token, place in there.items():
            before = written.logprobs[row, kept[token]]
            assert abs(found.logprobs[row, place] - before) <= quantisation_error(before)
            if written.counts is not None and found.counts is not None:
                assert found.counts[row, place] == written.counts[row, kept[token]]
    assert (found.counts is None) == (written.counts is None)


def same(one: TokenSignal, other: TokenSignal) -> bool:
    names = ("token_ids", "token_logprobs", "ids", "logprobs", "counts")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


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
        assert_stored(reader[uid], signal)
    return {uid: reader[uid] for uid in reader.uids}


specs = st.builds(SignalSpec, st.sampled_from(["top", "sampled"]), st.integers(1, 20))


@settings(max_examples=60)
@given(specs, st.sampled_from(VOCABULARIES), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 2**32))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, spec: SignalSpec, vocab_size: int, lengths: list[int], seed: int
) -> None:
    """Any shape, vocabulary and kind; a second writing of what was read changes nothing more."""
    folder = tmp_path_factory.mktemp("signals")
    whose = {**WHOSE, "vocab_size": vocab_size}
    rng = np.random.default_rng(seed)
    written = {f"uid-{n}": make_signal(rng, length, spec, vocab_size) for n, length in enumerate(lengths)}
    with SignalWriter(folder / "once", spec, **whose) as writer, SignalWriter(folder / "again", spec, **whose) as again:
        sizes = [writer.append(uid, signal) for uid, signal in written.items()]
        reader = SignalReader(folder / "once")
        for uid, signal in written.items():
            assert_stored(reader[uid], signal)
            again.append(uid, reader[uid])
        assert sum(sizes) == (folder / "once" / "records.bin").stat().st_size
    assert (reader.uids, len(reader), reader.spec, reader.vocab_size) == ([*written], len(written), spec, vocab_size)
    assert (reader.teacher, reader.tokenizer) == (WHOSE["teacher"], WHOSE["tokenizer"])
    reader.verify()
    second = SignalReader(folder / "again")
    assert all(same(reader[uid], second[uid]) for uid in written)


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
    assert (batch.counts is not None) == (spec.kind == "sampled")
    for row, single in enumerate(singles):
        size, wide = len(single), single.ids.shape[1]
        assert np.array_equal(batch.token_ids[row, :size], single.token_ids)
        assert np.array_equal(batch.token_logprobs[row, :size], single.token_logprobs)
        assert np.array_equal(batch.ids[row, :size, :wide], single.ids)
        assert np.array_equal(batch.logprobs[row, :size, :wide], single.logprobs)
        assert (batch.token_ids[row, size:] == -1).all()
        assert (batch.ids[row, size:] == -1).all()
        assert (batch.ids[row, :, wide:] == -1).all()
        assert np.isneginf(batch.logprobs[row, size:]).all()
        if batch.counts is not None and single.counts is not None:
            assert np.array_equal(batch.counts[row, :size, :wide], single.counts)
            assert batch.counts[row].sum() == size * spec.size


def test_the_error_of_storing_a_log_probability() -> None:
    """The bound holds everywhere and the figures of the docstring are true, and not twice too large."""
    values = -np.concatenate([np.geomspace(1e-12, 1024, 400_000), np.linspace(0, 30, 400_000), [0.0]])
    values = values.astype(np.float32)
    found = np.abs(dequantise(quantise(values)).astype(np.float64) - values)
    assert (found <= quantisation_error(values)).all()
    for probability, figure in ((-1.0, 1.8e-4), (-10.0, 1.0e-3), (-1e-4, 2e-7)):
        near = np.linspace(probability * 1.02, probability, 20_000)
        error = np.abs(dequantise(quantise(near)) - near).max()
        assert error <= figure
        assert error > 0.45 * figure
    assert (np.diff(quantise(np.sort(values)).astype(int)) <= 0).all()
    assert np.array_equal(quantise(dequantise(np.arange(65536, dtype=np.uint16))), np.arange(65536))
    edges = np.array([0.0, -np.inf, -1024.0, -1e30, 1e-6], np.float32)
    assert dequantise(quantise(edges)).tolist() == [0.0, -math.inf, -1024.0, -1024.0, 0.0]


def test_what_the_outcomes_leave_over_survives() -> None:
    """The tail of a confident teacher is 1 - its first probability: 1e-6 is still 1e-6 within half a percent."""
    for tail in (1e-2, 1e-4, 1e-6):
        stored = dequantise(quantise(np.array([math.log1p(-tail)], np.float32))).astype(np.float64)
        assert -math.expm1(stored[0]) == pytest.approx(tail, rel=0.06 if tail == 1e-6 else 5e-3)


@given(st.integers(0, 57), st.lists(st.integers(0, 2**57 - 1), max_size=50))
def test_packed_bits(width: int, numbers: list[int]) -> None:
    values = np.array([number % 2**width for number in numbers], np.int64)
    packed = np.frombuffer(pack(values, width), np.uint8)
    assert len(packed) == math.ceil(len(values) * width / 8)
    assert unpack(packed, len(values), width).tolist() == values.tolist()


@given(st.lists(st.integers(0, 2**48), max_size=60), st.integers(1, 2**48))
def test_elias_fano(values: list[int], slack: int) -> None:
    """Any sorted sequence, repetitions too, comes back, and takes at most 2 + log2(universe / n) bits a number."""
    ordered = np.array(sorted(values), np.int64)
    universe = max(values, default=0) + slack
    code = np.frombuffer(elias_fano(ordered, universe), np.uint8)
    found, rest = read_elias_fano(code, len(ordered), universe)
    assert found.tolist() == ordered.tolist()
    assert not len(rest)
    if values:
        assert len(code) * 8 <= len(values) * (2 + max(0.0, math.log2(universe / len(values)))) + 16


@pytest.mark.parametrize(("count", "vocab_size"), [(8, 151_936), (12, 151_936), (50, 151_936), (12, 49_152)])
def test_ids_take_hardly_more_than_any_code_of_sets_must(count: int, vocab_size: int) -> None:
    rng, tokens = np.random.default_rng(0), 300
    joined = [row * vocab_size + np.sort(rng.choice(vocab_size, count, replace=False)) for row in range(tokens)]
    bits = len(elias_fano(np.concatenate(joined), tokens * vocab_size)) * 8 / tokens
    bound = math.log2(math.comb(vocab_size, count))
    assert bound < bits < bound + count
    assert bits < 0.93 * count * math.ceil(math.log2(vocab_size))


def test_bytes_per_token_of_the_eight_most_likely(tmp_path: Path) -> None:
    """Half of what float32 and int32 take, when nine of ten tokens are among the eight (V = 151936)."""
    rng, spec = np.random.default_rng(0), SignalSpec("top", 8)
    ids = np.stack([rng.choice(151_936, 8, replace=False) for _ in range(500)])
    logprobs = np.sort(np.log(rng.dirichlet(np.full(9, 0.3), 500)[:, :8]))[:, ::-1]
    own = np.where(rng.random(500) < 0.9, 0, -1)
    token_ids = np.where(own == 0, ids[:, 0], (ids.max(-1) + 1) % 151_936)
    signal = TokenSignal(token_ids, np.where(own == 0, logprobs[:, 0], -9.0), ids, np.maximum(logprobs, -99.0))
    with SignalWriter(tmp_path, spec, **{**WHOSE, "vocab_size": 151_936}) as writer:
        size = writer.append("uid", signal)
    assert size / 500 < 33.5


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
    assert_stored(reader["a"], second)
    reader.verify()
    (tmp_path / "index.json").unlink()
    assert_stored(SignalReader(tmp_path)["a"], second)


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
        (TOP, {"vocab_size": 260}),
        (TOP, {"teacher": "another"}),
        (TOP, {"tokenizer": "beef"}),
    ],
)
def test_a_folder_holds_one_kind_of_numbers(tmp_path: Path, spec: SignalSpec, changed: dict[str, Any]) -> None:
    """What differs is named, and nothing is touched; a folder that holds nothing yet may be bound anew."""
    fill(tmp_path / "used", TOP, [3])
    before = {path.name: path.read_bytes() for path in (tmp_path / "used").iterdir()}
    differing = next(iter(changed), "kind" if spec.kind == "sampled" else "size")
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
        assert_stored(reader["a"], signal)
        assert SignalReader(tmp_path).uids == ["a", "b"]


def test_what_is_no_folder_of_signals_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no signals: it has no header\.json"):
        SignalReader(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use"):
        SignalWriter(tmp_path / "file" / "signal", TOP, **WHOSE)
    with pytest.raises(UserError, match=r"1 to 2\^31 tokens"):
        SignalWriter(tmp_path / "wide", TOP, **{**WHOSE, "vocab_size": 2**31 + 1})
    for wrong in (("top", 0), ("best", 3), ("sampled", True)):
        with pytest.raises(UserError):
            SignalSpec(*wrong)  # type: ignore[arg-type]


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.signals.FORMAT", 2)
    monkeypatch.setattr("distill.signal_folder.FORMAT", 2)
    fill(tmp_path, TOP, [3])
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 2, this version reads 1"):
        SignalReader(tmp_path)


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
    assert_stored(reader["small"], small)
    assert_stored(reader["large"], large)


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
