"""Students: small models from a preset, from a folder or hub id, or cut from a larger model.

`build_student` is the one door; `student_kind` says beforehand which tokenizer the student will need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from students.build import StudentKind as StudentKind
    from students.build import build_student as build_student
    from students.build import student_kind as student_kind
    from students.presets import PRESETS as PRESETS

__all__ = ["PRESETS", "StudentKind", "build_student", "student_kind"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import students` costs no torch."""
    if name == "PRESETS":
        from students.presets import PRESETS

        return PRESETS
    if name in __all__:
        from students import build

        return getattr(build, name)
    raise AttributeError(f"module 'students' has no {name!r}")
