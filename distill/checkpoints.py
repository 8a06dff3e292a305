"""The whole checkpoints of a run, found by the file that is written into each last. No torch."""

from __future__ import annotations

from pathlib import Path

STATE = "distill_state.json"  # beside trainer_state.json: the counts that transformers does not keep


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).exists()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def reason(error: BaseException) -> str:
    """Return why a write failed, in a few words on one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    full = "StorageFull" in text or "No space left" in text or "code: 28" in text
    return "no space left on the disk" if full else text[:200]
