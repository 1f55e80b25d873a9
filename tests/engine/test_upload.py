"""A batch changes streams once: copied on one, waited for by the other, its memory kept until that
one is done.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tapct.engine.upload import Upload
from tapct.types import Batch


def batch_of(number: int, size: int = 8, pin: bool = False) -> Batch:
    one = torch.tensor([number])
    tensors = (
        torch.full((1, size, size, size), number, dtype=torch.int16),
        one,
        torch.ones(1, 3),
        one,
        one,
        one,
    )
    return Batch(*(tensor.pin_memory() if pin else tensor for tensor in tensors))


def test_on_a_cpu_a_batch_stays_where_it_is() -> None:
    batch = batch_of(3)
    assert Upload(torch.device("cpu"))(batch).hu_BZYX is batch.hu_BZYX


@dataclass
class Log:
    """What happened, and on which stream."""

    lines: list[str] = field(default_factory=list)
    stream: str = "computing"


class Stream:
    """As much of a CUDA stream as is used."""

    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        self.log.lines.append(f"event on {self.name}")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.lines.append(f"{self.name} waits for {event}")


class Noting:
    """A tensor that notes where it is copied and who uses it."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def to(self, device: torch.device, non_blocking: bool) -> Noting:
        assert non_blocking and device.type == "cuda"
        self.log.lines.append(f"copy on {self.log.stream}")
        return self

    def record_stream(self, stream: Stream) -> None:
        self.log.lines.append(f"used by {stream.name}")


def test_on_a_gpu_it_is_copied_on_one_stream_and_handed_over_by_one_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Log()

    @contextmanager
    def within(stream: Stream) -> Any:
        before, log.stream = log.stream, stream.name
        yield
        log.stream = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log, "computing"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    upload = Upload(torch.device("cuda"))
    upload(Batch(*(Noting(log) for _ in range(6))))  # type: ignore[arg-type]
    assert log.lines == [
        *["copy on copying"] * 6,
        "event on copying",
        "computing waits for event of copying",
        *["used by computing"] * 6,
    ]


@pytest.mark.gpu
def test_what_is_computed_on_a_gpu_is_of_the_batch_that_was_handed_over() -> None:
    device = torch.device("cuda")
    upload, sums = Upload(device), []
    square = torch.rand(2048, 2048, device=device)
    batches = [batch_of(number, 128, pin=True) for number in range(40)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            moved = upload(batch)
            for _ in range(5):
                square = square @ square / 1024  # keeps the computing stream behind
            sums.append(moved.hu_BZYX.sum(dtype=torch.int64))
            del moved
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [int(value) for value in sums] == [number * 128**3 for number in range(40)]
