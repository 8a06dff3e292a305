"""How a teacher of another tokenizer takes part in training: what the trainer asks of an alignment.

Here is only the interface; alignments are made in `align/`. Where both sides read the same token ids there is none,
and nothing of this runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from distill.batch import Batch
    from distill.losses import LossMode
    from distill.records import Message
    from distill.render import Example


class Alignment(Protocol):
    """One pair of tokenizers, and one method that compares across them.

    Attributes:
        name: of the method.
        why: one line: what decided for it.
        teacher_tokenizer: what the teacher's ids belong to.
        modes: what stands in for the loss modes that ask a teacher: name -> mode.
        labelled: whether `soft_logits` also teaches the text's own tokens, with the options it has by default.
    """

    name: str
    why: str
    teacher_tokenizer: Any
    modes: Mapping[str, LossMode]

    @property
    def labelled(self) -> bool:
        """See the class."""
        ...

    def pair(
        self, example: Example, conversation: list[Message] | tuple[str, str], *, sampled: np.ndarray | None = None
    ) -> Example | None:
        """Return an example with the teacher's tokens of the same text.

        Args:
            example: the student's; its own tokens stay as they are.
            conversation: what it was made of: messages, or prompt and completion as plain strings.
            sampled: (U,) the teacher's tokens of the completion, where stored numbers speak of them.

        Returns:
            None where the teacher's tokens are not the same bytes.

        Raises:
            UserError: a chat template that refuses the conversation.
        """
        ...

    def pair_rollouts(self, rolled: Batch, before: Batch, *, teacher_length: int | None = None) -> tuple[Batch, Tensor]:
        """Give a batch that the student has just written the teacher's tokens of what it wrote.

        Args:
            rolled: one sequence to a row, its prompts those of `before`.
            before: the batch whose completions were replaced.
            teacher_length: most tokens that the teacher has positions for; it reads no further.

        Returns:
            The batch, and (2,) float64 how many rows the teacher reads only in part, of how many.
        """
        ...
