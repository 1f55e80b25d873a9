"""The loss of each archive, where a run is trained on several: sums on the device, no waiting.

A batch mixes samples of all archives, so a loss that can name the part of each sample
(`LossResult.value_by_sample`) is divided by archive; others, such as KoLeo, which compares samples,
are left out.

Axes: A archives, B samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapct.base import metric_names as names
from tapct.distributed.collectives import Packet
from tapct.ssl.step import StepOutput
from tapct.types import Batch

_ENTRY = "archives"  # entry of the step's packet: sums of losses, and numbers of samples


@dataclass(frozen=True)
class Archives:
    """Archives of a run.

    Args:
        names: name of each archive.
        ends: number of scans in this archive and all before it, ascending: which archive a scan
            belongs to.
    """

    names: tuple[str, ...]
    ends: tuple[int, ...]

    @torch.no_grad()
    def sums(self, output: StepOutput, batch: Batch) -> Tensor | None:
        """Losses and samples of one micro-batch by archive.

        Args:
            output: output of the micro-batch.
            batch: micro-batch, on the host.
        Returns:
            float64 (A, 2): sum of the samples' losses, and their number; None where no loss of the
            run can be divided.
        """
        parts = [one.value_by_sample() for one in output.results if one.value_by_sample is not None]
        if not parts:
            return None
        loss_B = torch.stack([part.double() for part in parts]).sum(0) * len(parts[0])
        archive_B = torch.bucketize(batch.scan_B, torch.tensor(self.ends), right=True)
        archive_B = archive_B.to(loss_B.device, non_blocking=True)
        is_of_AB = torch.arange(len(self.ends), device=loss_B.device)[:, None] == archive_B
        # a product with zeros and ones, since sums by index have no fixed order on a GPU
        return is_of_AB.double() @ torch.stack([loss_B, torch.ones_like(loss_B)], 1)

    def collect(self, sums: Sequence[Tensor | None], packet: Packet) -> None:
        """Put the sums of all micro-batches of a step into the packet that ranks add up."""
        present = [one for one in sums if one is not None]
        if present:
            packet.sum(_ENTRY, torch.stack(present).sum(0))

    def readings(self, packet: Packet) -> list[tuple[str, Tensor]]:
        """Mean loss and number of samples of each archive in a step, from the reduced packet."""
        if _ENTRY not in packet.parts:
            return []
        numbers = []
        for name, (loss, samples) in zip(self.names, packet[_ENTRY], strict=True):
            mean = loss / samples.clamp(min=1)
            numbers.append((names.archive(name, names.ARCHIVE_LOSS), mean))
            numbers.append((names.archive(name, names.ARCHIVE_SAMPLES), samples.clone()))
        return numbers


def without_absent(record: dict[str, float]) -> dict[str, float]:
    """The numbers of a step without the loss of archives that had no sample in it."""
    absent = [
        name
        for name, value in record.items()
        if names.is_archive_reading(name, names.ARCHIVE_SAMPLES) and value == 0
    ]
    for name in absent:
        del record[name.removesuffix(names.ARCHIVE_SAMPLES) + names.ARCHIVE_LOSS]
    return record
