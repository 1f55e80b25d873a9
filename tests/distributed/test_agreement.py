"""Ranks that were started differently refuse to start together, and all of them end."""

from __future__ import annotations

import datetime
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch.distributed as dist

from tapct.base.exits import SharedError, UserError
from tapct.base.ranks import Ranks
from tapct.distributed.agreement import agree, in_words

PATIENCE = datetime.timedelta(seconds=10)
SAME = {"optim.lr": "0.01", "seed": "0"}


def nothing() -> None:
    pass


Facts = Mapping[str, str] | BaseException


def outcomes_of(
    facts: Sequence[Facts], first: Callable[[], object] = nothing
) -> list[BaseException | None]:
    """What `agree` raises on each rank; the ranks are threads that share a store. A rank whose
    facts are an error raises it.
    """
    store = dist.HashStore()
    outcomes: list[BaseException | None] = [None] * len(facts)

    def run(rank: int) -> None:
        def own() -> Mapping[str, str]:
            found = facts[rank]
            if isinstance(found, BaseException):
                raise found
            return found

        try:
            agree(store, Ranks(rank, len(facts)), own, first, PATIENCE)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


def test_equal_ranks_start_and_only_the_first_prepares() -> None:
    calls: list[int] = []
    assert outcomes_of([SAME] * 4, lambda: calls.append(1)) == [None] * 4
    assert calls == [1]


def test_a_rank_that_differs_ends_all_and_is_named_with_what_differs() -> None:
    calls: list[int] = []
    other = {"optim.lr": "0.0001", "seed": "0"}
    outcomes = outcomes_of([SAME, SAME, other, SAME], lambda: calls.append(1))
    lines = {str(error) for error in outcomes}
    (line,) = lines
    assert line.startswith("rank 2 (host ") and "different" in line
    assert "optim.lr is 0.0001 there and 0.01 on rank 0" in line and "seed" not in line
    # the first rank and the one that differs print it
    shared = [isinstance(error, SharedError) for error in outcomes]
    assert shared == [False, True, False, True]
    assert all(isinstance(error, UserError) for error in outcomes) and calls == []


def test_many_differences_are_counted() -> None:
    other = {str(number): "1" for number in range(9)}
    line = str(outcomes_of([SAME, other, other, SAME, other])[3])
    assert "0 is 1 there and not set on rank 0" in line and "8 more differences" in line
    assert "ranks 2, 4 differ from rank 0 too" in line


def test_the_error_of_the_first_rank_ends_all() -> None:
    def refuse() -> None:
        raise UserError("the run folder is taken")

    outcomes = outcomes_of([SAME] * 3, refuse)
    assert [str(error) for error in outcomes] == ["the run folder is taken"] * 3
    assert [isinstance(error, SharedError) for error in outcomes] == [False, True, True]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "full")])
def test_any_error_of_the_first_rank_ends_all_at_once(error: BaseException) -> None:
    def fail() -> None:
        raise error

    began = time.monotonic()
    own, *others = outcomes_of([SAME] * 3, fail)
    assert own is error and time.monotonic() - began < PATIENCE.total_seconds() / 2
    for other in others:
        assert isinstance(other, SharedError)
        assert str(other) == in_words(error) and "\n" not in str(other)


def test_a_bug_on_one_rank_ends_all_at_once_and_is_named() -> None:
    calls: list[int] = []
    began, bug = time.monotonic(), RuntimeError("first line\nsecond line")
    outcomes = outcomes_of([SAME, SAME, bug, SAME], lambda: calls.append(1))
    assert outcomes[2] is bug and calls == []
    assert time.monotonic() - began < PATIENCE.total_seconds() / 2
    line = (
        f"rank 2 (host {socket.gethostname()}) cannot start: RuntimeError: first line second line"
    )
    assert [str(outcomes[rank]) for rank in (0, 1, 3)] == [line] * 3
    assert [isinstance(outcomes[rank], SharedError) for rank in (0, 1, 3)] == [False, True, True]


def test_what_a_user_can_correct_is_printed_where_it_is_and_by_the_first_rank() -> None:
    missing = UserError("no GPU here")
    outcomes = outcomes_of([SAME, missing, {"seed": "1"}])
    assert all("rank 1" in str(one) and "no GPU here" in str(one) for one in outcomes)
    outcomes = outcomes_of([missing, SAME, SAME])
    assert all("rank 0" in str(one) and "no GPU here" in str(one) for one in outcomes)
    assert [isinstance(one, SharedError) for one in outcomes] == [False, True, True]
    outcomes = outcomes_of([missing] * 3)
    assert [str(one) for one in outcomes] == ["no GPU here"] * 3
    assert [isinstance(one, SharedError) for one in outcomes] == [False, True, True]


def test_a_rank_that_never_comes_ends_the_others_in_time() -> None:
    store = dist.HashStore()
    with pytest.raises(RuntimeError):
        agree(store, Ranks(1, 2), lambda: SAME, nothing, datetime.timedelta(seconds=0.1))
