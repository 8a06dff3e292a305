"""The teacher's numbers on disk: what it said at every token of a trace.

A store's `signal/` folder holds `header.json` (whose numbers these are, bound when it is made), `records.bin` (one
record per trace, appended) and `index.json` (where each begins; made anew from the records' headers whenever it is
missing or behind). A record is written before its trace's line in the journal, so a trace that counts as drawn has its
numbers. A torn last record is cut off when the folder is opened for writing; the last record of a uid is the one that
counts. Reading maps the file into memory and decodes whole traces without a loop over tokens; how a record is coded is
in `distill.signal_record`.

The records themselves, `SignalSpec`, `TokenSignal` and `SignalBatch`, are in `distill.token_signal`. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from distill.errors import UserError
from distill.signal_folder import (
    FORMAT,
    HEAD,
    HEADER,
    INDEX,
    Bytes,
    SignalFolder,
    as_record,
    is_whole,
    mapped,
    write_sealed,
)
from distill.signal_record import FINER, FLOOR, Entries, decode, encode
from distill.store import full_disk
from distill.token_signal import SignalBatch, SignalSpec, TokenSignal, signal_stream

__all__ = ["HEADER", "SignalBatch", "SignalReader", "SignalSpec", "SignalWriter", "TokenSignal", "signal_stream"]


class SignalWriter(SignalFolder):
    """A folder of signals opened for appending; use as a context manager. One writer at a time, by an OS lock."""

    def __init__(
        self, folder: Path, spec: SignalSpec, *, vocab_size: int, teacher: str, tokenizer: str, sync_every: int = 16
    ) -> None:
        """Open or make a folder.

        Args:
            vocab_size: V, the outcomes of the model, at most 2 ** 31.
            teacher: the identity of the model whose numbers these are.
            tokenizer: `distill.models.fingerprint` of its tokenizer, which gives the ids their meaning.
            sync_every: records between two syncs to the disk.

        Raises:
            UserError: the folder holds other numbers (what differs is named), is damaged, or is being written to.
            RunError: the disk is full.
        """
        super().__init__(folder)
        if not 1 <= vocab_size <= 2**31:
            raise UserError(f"a vocabulary has 1 to 2^31 tokens, not {vocab_size}")
        self.sync_every, self.unsynced = sync_every, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.stream = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise UserError(f"cannot use {folder} for signals: {error.strerror or error}") from error
        try:
            self._claim(spec, vocab_size, teacher, tokenizer)
        except BaseException:
            self.stream.close()
            raise

    def _claim(self, spec: SignalSpec, vocab_size: int, teacher: str, tokenizer: str) -> None:
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is writing to {self.folder}: wait for it or name another --out"
            ) from error
        for unfinished in self.folder.glob(".*.json.[0-9]*"):  # of a header or index that a killed run was writing
            unfinished.unlink()
        whose = {**asdict(spec), "vocab_size": vocab_size, "teacher": teacher, "tokenizer": tokenizer}
        empty = not os.fstat(self.stream.fileno()).st_size
        if empty:  # nothing was kept for whoever claimed it before
            laws = {
                "logprob": "-code / resolution",
                "log_odds_of_tail": f"code / ({FINER} * resolution)",
                "floor": -FLOOR,
            }
            header = {"format": FORMAT, **whose, "logits": "raw", "laws": laws}
            (self.folder / INDEX).unlink(missing_ok=True)
            write_sealed(self.folder / HEADER, header)
        self.read_header()
        self.require(**whose)
        data = mapped(self.stream.fileno())
        self.find_records(data)
        self._drop_bad_end(data)
        self.torn_bytes = len(data) - self.covered
        os.ftruncate(self.stream.fileno(), self.covered)

    def _drop_bad_end(self, data: Bytes) -> None:
        # After a power cut a record may have its length but not its content: nothing was journaled for it yet.
        start = max(self.offsets.values(), default=None)
        if start is not None and not is_whole(self, data, start):
            (self.folder / INDEX).unlink(missing_ok=True)
            self.offsets, self.covered = {}, 0
            for uid, offset, end in self.walk(data, stop=start):
                self.offsets[uid], self.covered = offset, end

    def __enter__(self) -> SignalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, uid: str, signal: TokenSignal) -> int:
        """Add one trace's signal and return the bytes it takes; an earlier one of the same uid counts no more.

        Raises:
            ValueError: a signal of another kind or size than this folder's, or ids outside its vocabulary.
            RunError: the disk is full. A partly written record is cut off again.
        """
        name = uid.encode()
        self._check(name, signal)
        sizes, payload = encode(signal, self.spec, self.vocab_size)
        record = as_record(name, sizes, payload)
        left = memoryview(record)
        try:
            while left:
                left = left[self.stream.write(left) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.stream.fileno(), self.covered)
            raise full_disk(error, self.path) from error
        self.offsets[uid], self.covered = self.covered, self.covered + len(record)
        self.unsynced += 1
        if self.unsynced >= self.sync_every:
            self.sync()
        return len(record)

    def _check(self, name: bytes, signal: TokenSignal) -> None:
        if not 0 < len(name) < 2**16:
            raise ValueError(f"a uid has 1 to {2**16 - 1} bytes, not {len(name)}")
        if (signal.counts is not None) != (self.spec.kind == "sampled"):
            raise ValueError(f"{self.folder} holds {self.spec.kind!r} signals, this one is of the other kind")
        if self.spec.logprobs and signal.logprobs is None:
            raise ValueError(f"{self.folder} holds log-probabilities, this signal has none")
        if signal.ids.shape[1] > self.spec.size and (signal.ids[:, self.spec.size :] >= 0).any():
            raise ValueError(f"more than {self.spec.size} outcomes at a position")
        if signal.counts is not None and (signal.counts.sum(-1) != self.spec.size).any():
            raise ValueError(f"counts that do not add up to {self.spec.size} draws")
        highest = max(signal.token_ids.max(initial=-1), signal.ids.max(initial=-1))
        if highest >= self.vocab_size:
            raise ValueError(f"token id {highest} in a vocabulary of {self.vocab_size}")

    def sync(self) -> None:
        """Make every appended record survive a power cut."""
        if self.unsynced:
            try:
                os.fsync(self.stream.fileno())
            except OSError as error:
                raise full_disk(error, self.path) from error
            self.unsynced = 0

    def close(self) -> None:
        """Sync, write the index and give the lock back."""
        try:
            self.sync()
            write_sealed(self.folder / INDEX, {"covered": self.covered, "offsets": self.offsets})
        finally:
            self.stream.close()


class SignalReader(SignalFolder):
    """The signals in a folder, by trace uid, in order of first appearance; it may be written to meanwhile.

    Attributes:
        spec, vocab_size, teacher, tokenizer: as they were given to the writer.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            UserError: no signals there, or damaged ones.
        """
        super().__init__(folder)
        self.read_header()
        try:
            with self.path.open("rb") as stream:
                self.data = mapped(stream.fileno())
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.find_records(self.data)

    @property
    def uids(self) -> list[str]:
        """The uids of all traces."""
        return list(self.offsets)

    def __getitem__(self, uid: str) -> TokenSignal:
        """Return a trace's signal, its K the width of its fullest row.

        Raises:
            KeyError: there is none.
            UserError: the record is damaged.
        """
        entries = self._entries(uid)
        ids, logprobs, counts = self._empty((len(entries.token_ids), int(entries.widths.max(initial=0))))
        _fill(entries, ids, logprobs, counts)
        return TokenSignal(entries.token_ids, entries.token_logprobs, ids, logprobs, counts, entries.tail)

    def gather(self, uids: Sequence[str]) -> SignalBatch:
        """Return several traces' signals padded to one shape; no loop runs over tokens.

        Raises:
            KeyError: a trace has none.
            UserError: a record is damaged.
        """
        found = [self._entries(uid) for uid in uids]
        lengths = np.array([len(each.token_ids) for each in found], np.int64)
        width = max((int(each.widths.max(initial=0)) for each in found), default=0)
        shape = (len(found), int(lengths.max(initial=0)))
        token_ids, token_logprobs, _ = self._empty(shape)
        tail = np.zeros(shape, np.float32) if self.spec.logprobs else None
        ids, logprobs, counts = self._empty((*shape, width))
        for row, (entries, length) in enumerate(zip(found, lengths, strict=True)):
            token_ids[row, :length] = entries.token_ids
            if token_logprobs is not None and tail is not None:
                token_logprobs[row, :length], tail[row, :length] = entries.token_logprobs, entries.tail
            _fill(
                entries, ids[row], None if logprobs is None else logprobs[row], None if counts is None else counts[row]
            )
        return SignalBatch(lengths, token_ids, token_logprobs, ids, logprobs, counts, tail)

    def verify(self) -> None:
        """Read everything.

        Raises:
            UserError: a record is damaged; the file and the trace are named.
        """
        seen: dict[str, int] = {}
        for uid, offset, _ in self.walk(self.data):
            if not is_whole(self, self.data, offset):
                raise self.damaged(f"the record of {uid!r}, at byte {offset}")
            seen[uid] = offset
        if seen != self.offsets:
            raise self.damaged(f"{len(seen)} traces are there, {INDEX} lists {len(self.offsets)}")
        for uid in seen:
            _ = self[uid]

    def _entries(self, uid: str) -> Entries:
        start = self.offsets[uid]
        size, sizes, uid_bytes, _ = self.read_head(self.data, start)
        begin = start + HEAD + uid_bytes
        what = f"the record of {uid!r}, at byte {start}"
        if not is_whole(self, self.data, start) or self.data[start + HEAD : begin] != uid.encode():
            raise self.damaged(what)
        try:
            return decode(memoryview(self.data[begin : start + size]), sizes, self.spec, self.vocab_size)
        except ValueError as error:
            raise self.damaged(f"{what}: {error}") from error

    def _empty(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return ids, log-probabilities and counts of empty places only."""
        logprobs = np.full(shape, -np.inf, np.float32) if self.spec.logprobs else None
        counts = np.zeros(shape, np.int32) if self.spec.kind == "sampled" else None
        return np.full(shape, -1, np.int32), logprobs, counts


def _fill(entries: Entries, ids: np.ndarray, logprobs: np.ndarray | None, counts: np.ndarray | None) -> None:
    """Write a trace's outcomes into the empty arrays (T, K)."""
    # Where row r begins in the arrays, less where it begins among the entries, is added to each entry's number.
    lacking = np.cumsum(ids.shape[1] - entries.widths) - (ids.shape[1] - entries.widths)
    at = np.arange(len(entries.ids)) + np.repeat(lacking, entries.widths)
    ids.reshape(-1)[at] = entries.ids
    if logprobs is not None:
        logprobs.reshape(-1)[at] = entries.logprobs
    if counts is not None:
        counts.reshape(-1)[at] = entries.counts
