"""A stable name for a model, made of what is in its files rather than of where they lie.

It enters the uid of every trace, so a moved folder resumes and a retrained one does not pass for its elder. It does not
verify downloads (`distill.fetch` does).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from distill.errors import UserError
from distill.hub import SMALL_FILES, is_gguf, locate

_WHOLE_BYTES = 64 * 2**20  # weight files up to this size are hashed wholly
_SAMPLE_BYTES = 4096  # read at the start and in the middle of every tensor of a larger one
_IDENTITY_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
)


def model_identity(model: str) -> str:
    """Return a stable name for a model, to be part of its traces' uids.

    A hub id is its own name. A local folder or .gguf file is `name@hash`: moving it keeps the name, changing its
    configuration, tokenizer, chat template or weights changes it. The hash covers the small files wholly and, of the
    weights, sizes and headers, all bytes of files up to 64 MiB, and of larger ones 4 KiB at the start and in the middle
    of every tensor: an edit that touches nothing of that is not seen.

    Raises:
        UserError: a path that does not exist, or a damaged weight file.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if path.is_absolute() or is_gguf(model) or (len(path.parts) > 1 and path.parent.is_dir()):
            locate(model)  # raises, with the nearest sibling
        return model
    path = path.resolve()
    digest = hashlib.sha256()
    weights = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    small: set[Path] = set()
    if path.is_dir():
        small = {file for pattern in SMALL_FILES for file in path.glob(pattern)} - set(weights)
    for file in sorted(small):
        if file.name in _IDENTITY_FILES:
            content = _without_provenance(file) if file.name == "config.json" else file.read_bytes()
            digest.update(f"{file.name}:{len(content)}:".encode() + content)
    for file in weights:
        digest.update(f"{file.suffix}:{file.stat().st_size}:".encode())
        for part in _weight_bytes(file):
            digest.update(part)
    name = path.stem if path.is_file() else path.name
    return f"{name}@{digest.hexdigest()[:12]}"


def _without_provenance(config: Path) -> bytes:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return config.read_bytes()
    kept = {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}
    return json.dumps(kept, sort_keys=True).encode()


def _weight_bytes(file: Path) -> Iterator[bytes]:
    """Yield the bytes of a weight file that its identity covers."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE_BYTES:
            while chunk := stream.read(2**20):
                yield chunk
            return
        if file.suffix == ".safetensors":
            length = struct.unpack("<Q", stream.read(8))[0]
            header = stream.read(min(length, size))
            yield header
            try:
                tensors = json.loads(header)
            except ValueError as error:
                raise UserError(f"the weight file {file} is damaged: its header cannot be read") from error
            spans = [value["data_offsets"] for key, value in sorted(tensors.items()) if key != "__metadata__"]
            offsets = sorted({8 + length + at for start, end in spans for at in (start, (start + end) // 2)})
        else:  # no index of tensors at hand: 512 places, evenly spread
            offsets = [size * i // 512 for i in range(512)]
        for offset in offsets:
            stream.seek(offset)
            yield stream.read(_SAMPLE_BYTES)
