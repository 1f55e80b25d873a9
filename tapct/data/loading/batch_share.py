"""How the global batch is shared by ranks and micro-batches: one rule for training, plan,
submit.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapct.base.exits import UserError


@dataclass(frozen=True)
class BatchShare:
    """The samples of an optimizer step, shared equally by micro-batches and ranks.

    Args:
        global_batch: samples of an optimizer step over all ranks and micro-batches, G.
        accumulation: micro-batches of a step.
        world: number of ranks.
    Raises:
        UserError: G is no multiple of world x accumulation.
    """

    global_batch: int
    accumulation: int = 1
    world: int = 1

    def __post_init__(self) -> None:
        self.check(self.global_batch, self.accumulation, self.world)

    @staticmethod
    def check(global_batch: int, accumulation: int, world: int = 1) -> None:
        """Raise UserError where ranks and micro-batches cannot share the global batch equally;
        arguments as of the class.
        """
        parts = world * accumulation
        if global_batch % parts == 0 and global_batch >= parts:
            return
        above = -(-global_batch // parts) * parts
        nearest = [str(size) for size in (above - parts, above) if size]
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        raise UserError(
            f"train.global_batch {global_batch} cannot be shared equally by {ranks} with "
            f"train.accumulation {accumulation}: it must be a multiple of {parts}, the product of "
            f"both; set it to {' or '.join(nearest)}"
        )

    @property
    def micro(self) -> int:
        """Samples of one micro-batch of one rank."""
        return self.global_batch // (self.world * self.accumulation)

    def samples(self, step: int, micro: int, rank: int) -> range:
        """The samples of one micro-batch of one rank, as numbers that count through the whole run.

        Args:
            step: finished optimizer steps before this one, from 0.
            micro: micro-batch of the step, 0 .. accumulation - 1.
            rank: rank, 0 .. world - 1.
        Returns:
            Consecutive numbers; over all micro-batches and ranks they are step * G ..
            (step + 1) * G - 1.
        """
        assert step >= 0 and 0 <= micro < self.accumulation and 0 <= rank < self.world
        start = step * self.global_batch + (micro * self.world + rank) * self.micro
        return range(start, start + self.micro)
