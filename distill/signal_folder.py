"""What reading and writing a folder of signals share: the header, the walk from record to record, the index.

A record is a fixed head, the trace's uid and a payload (`distill.signal_record`). The head has a checksum of its own,
so that its lengths can be trusted; another one covers uid and payload. Both JSON files are sealed by a checksum too.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.signal_record import Sizes
from distill.store import replacing
from distill.token_signal import SignalSpec

HEADER, RECORDS, INDEX = "header.json", "records.bin", "index.json"
FORMAT = 2
MAGIC = b"SGNL"
# magic, bytes of the uid, tokens, distinct ids, bytes of the bitmap and of the payload, crc32 of uid and payload
FIELDS = struct.Struct("<4sHIIIII")
CRC = struct.Struct("<I")  # of these fields themselves, so that the walk from record to record can trust them
HEAD = FIELDS.size + CRC.size
Bytes = bytes | mmap.mmap


class SignalFolder:
    """A folder of signals: its header, and where each record begins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / RECORDS
        self.offsets: dict[str, int] = {}
        self.covered = 0  # bytes of whole records

    def __len__(self) -> int:
        return len(self.offsets)

    def __contains__(self, uid: object) -> bool:
        return uid in self.offsets

    def read_header(self) -> None:
        """Read what the header says.

        Raises:
            UserError: missing, damaged, or of another version.
        """
        path = self.folder / HEADER
        if not path.is_file():
            raise UserError(f"{self.folder} holds no signals: it has no {HEADER}")
        header = read_sealed(path)
        if header is None:
            raise UserError(f"{path} is damaged: remove {self.folder} and score the traces again")
        if header["format"] != FORMAT:
            remedy = (
                f"remove {self.folder} and score the traces again" if header["format"] < FORMAT else "update distill"
            )
            raise UserError(f"{path} is of format {header['format']}, this version reads {FORMAT}: {remedy}")
        self.header = header
        self.spec = SignalSpec(*(header[field.name] for field in fields(SignalSpec)))
        self.vocab_size, self.teacher, self.tokenizer = header["vocab_size"], header["teacher"], header["tokenizer"]

    def require(self, **whose: Any) -> None:
        """Refuse numbers that are not those asked for.

        Raises:
            UserError: what differs is named.
        """
        if differing := [name for name, value in whose.items() if self.header[name] != value]:
            listed = ", ".join(f"{name} is {self.header[name]!r} there and {whose[name]!r} here" for name in differing)
            raise UserError(f"{self.folder} holds other numbers ({listed}): name another --out")

    def find_records(self, data: Bytes) -> None:
        """Fill `offsets` from the index and from the headers of the records it does not cover."""
        index = read_sealed(self.folder / INDEX) if (self.folder / INDEX).is_file() else None
        if index is not None and index["covered"] <= len(data):
            self.offsets, self.covered = index["offsets"], index["covered"]
        for uid, offset, end in self.walk(data, self.covered):
            self.offsets[uid], self.covered = offset, end

    def walk(self, data: Bytes, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, int, int]]:
        """Yield uid, begin and end of the whole records before `stop`; a torn last one, or zeros, is passed over.

        Raises:
            UserError: damaged headers.
        """
        stop = len(data) if stop is None else stop
        while stop - start >= HEAD:
            size, _, uid_bytes, _ = self.read_head(data, start)
            end = start + size
            if not size or end > stop:
                return
            uid = data[start + HEAD : start + HEAD + uid_bytes]
            yield uid.decode("utf-8", "replace"), start, end
            start = end

    def read_head(self, data: Bytes, start: int) -> tuple[int, Sizes, int, int]:
        """Return a record's bytes in all, its sizes, the bytes of its uid and its checksum; 0 bytes for a zeroed end.

        Raises:
            UserError: the header is damaged.
        """
        fixed = data[start : start + FIELDS.size]
        (crc,) = CRC.unpack_from(data, start + FIELDS.size)
        if zlib.crc32(fixed) != crc:
            if not data[start:].strip(b"\0"):  # a power cut left the length and not the content
                return 0, Sizes(0, 0, 0), 0, 0
            raise self.damaged(f"the record at byte {start}")
        _, uid_bytes, tokens, distinct, bitmap, payload_bytes, body_crc = FIELDS.unpack(fixed)
        return HEAD + uid_bytes + payload_bytes, Sizes(tokens, distinct, bitmap), uid_bytes, body_crc

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is damaged ({what}): remove {self.folder} and score the traces again")


def as_record(uid: bytes, sizes: Sizes, payload: bytes) -> bytes:
    """Return a record's bytes."""
    body = uid + payload
    lengths = (len(uid), sizes.tokens, sizes.distinct, sizes.bitmap, len(payload))
    fixed = FIELDS.pack(MAGIC, *lengths, zlib.crc32(body))
    return fixed + CRC.pack(zlib.crc32(fixed)) + body


def is_whole(folder: SignalFolder, data: Bytes, start: int) -> bool:
    """Return whether the record that begins there is all there and unchanged."""
    size, _, _, crc = folder.read_head(data, start)
    return start + size <= len(data) and zlib.crc32(data[start + HEAD : start + size]) == crc


def mapped(descriptor: int) -> Bytes:
    """Return a file's content, mapped into memory; an empty file cannot be."""
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if os.fstat(descriptor).st_size else b""


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that knows its own checksum, whole or not at all."""
    text = json.dumps(value, sort_keys=True)
    with replacing(path) as stream:
        json.dump({"crc32": zlib.crc32(text.encode()), **value}, stream)
        stream.write("\n")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` wrote, None when that is not what the file holds."""
    try:
        value = json.loads(path.read_bytes())
        crc = value.pop("crc32")
        text = json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return value if zlib.crc32(text.encode()) == crc else None
