"""Batches go to the device on a stream of their own, so that a copy runs beside the computation
before it.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from tapct.types import Batch


class Upload:
    """Copies a batch on one stream and hands it over to the stream that computes, by one event.

    The host is steps ahead of a GPU and waits for neither stream. On a CPU a batch stays where it
    is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, ready for the current stream.

        Args:
            batch: batch in pinned memory; otherwise the copy waits for the host.
        """
        if self.stream is None:
            return batch.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device)
        computing.wait_event(self.stream.record_event())
        for field in fields(moved):
            # its memory goes to no later copy before the computation with it is done
            getattr(moved, field.name).record_stream(computing)
        return moved
