"""Ranks compare what they are about to do before they do anything together.

Ranks with another config, code or store would train without an error: the sums over ranks have the
same shape. So every rank writes a digest of its facts into the store at which the ranks met, the
first rank compares them, and all ranks read its verdict. No collective is needed for it, so it also
works where the ranks would choose different back-ends.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from tapct.base import ending
from tapct.base.exits import SharedError, UserError, single_line
from tapct.base.ranks import Ranks

MOST_FACTS = 3  # differences that the error line names
MOST_RANKS = 4  # ranks that it names
LEAVE_S = 10.0  # the first rank keeps the store for so long until the others have read the verdict


@dataclass(frozen=True)
class Statement:
    """What a rank writes for the others before the start.

    Args:
        host: name of its machine.
        facts: name -> value.
        failure: why it cannot start, as one line; empty where it can.
    """

    host: str
    facts: dict[str, str]
    failure: str = ""


def agree(
    store: dist.Store,
    place: Ranks,
    facts: Callable[[], Mapping[str, str]],
    first: Callable[[], object],
    patience: datetime.timedelta,
) -> None:
    """Return on every rank, or raise on every rank.

    Args:
        store: key-value store at which the ranks met.
        place: place of this process.
        facts: function that returns name -> value; all ranks must have the same ones. Its error
            ends all ranks, whatever it is.
        first: function that the first rank calls once the facts are equal; its error ends all
            ranks, whatever it is.
        patience: time within which the verdict must come.
    Raises:
        UserError: ranks differ, or one of them cannot start.
        BaseException: what `facts` or `first` has raised on this rank and is no UserError.
    """
    failure: BaseException | None = None
    own: dict[str, str] = {}
    try:
        own = dict(facts())
    except BaseException as error:  # an interrupt too: the others must not wait for this rank
        failure = error
    statement = Statement(
        ending.node_name(os.environ), own, "" if failure is None else in_words(failure)
    )
    text = json.dumps(asdict(statement), sort_keys=True)
    store.set(f"facts/{place.rank}", text)
    content = json.dumps([own, statement.failure], sort_keys=True)
    store.set(f"digest/{place.rank}", hashlib.sha256(content.encode()).hexdigest())
    if place.is_first:
        line, others, failure = first_verdict(
            store, place.world, statement, failure, first, patience
        )
        store.set("verdict", json.dumps([line, others]))
        with suppress(dist.DistError, RuntimeError):  # a rank that has ended has heard nothing
            heard = [f"heard/{rank}" for rank in range(1, place.world)]
            store.wait(heard, datetime.timedelta(seconds=LEAVE_S))
    else:
        store.wait(["verdict"], patience)
        line, others = json.loads(store.get("verdict"))
        store.set(f"heard/{place.rank}", "yes")
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    if line:
        # only the first rank and those that differ print it, once each
        prints = place.is_first or place.rank in others
        raise UserError(line) if prints else SharedError(line)


def first_verdict(
    store: dist.Store,
    world: int,
    statement: Statement,
    failure: BaseException | None,
    first: Callable[[], object],
    patience: datetime.timedelta,
) -> tuple[str, list[int], BaseException | None]:
    """What the first rank finds: a line for all ranks, empty where they start; the ranks that
    differ; and the error of its own.

    Args:
        store: key-value store at which the ranks met.
        world: number of ranks.
        statement: what the first rank has written.
        failure: error of its own facts.
        first: function that it calls once the facts are equal.
        patience: time within which the others must write theirs.
    """
    others: list[int] = []
    try:
        others = different_ranks(store, world, patience)
        if others and failure is not None:
            return cannot_start(0, statement), [], failure
        if others:
            return what_differs(store, others), others, None
        if failure is None:
            first()
            return "", [], None
    except BaseException as error:
        return in_words(error), others, error
    return statement.failure, others, failure


def in_words(error: BaseException) -> str:
    """An error as one line; one that is not meant for users with its type."""
    name, text = type(error).__name__, single_line(error)
    if isinstance(error, UserError | OSError) and text:
        return text
    return f"{name}: {text}" if text else name


def different_ranks(store: dist.Store, world: int, patience: datetime.timedelta) -> list[int]:
    """Ranks whose digest is not that of rank 0."""
    store.wait([f"digest/{rank}" for rank in range(world)], patience)
    digests = [store.get(f"digest/{rank}") for rank in range(world)]
    return [rank for rank, digest in enumerate(digests) if digest != digests[0]]


def cannot_start(rank: int, statement: Statement) -> str:
    """The error line for a rank that has failed before the start."""
    return f"rank {rank} (host {statement.host}) cannot start: {statement.failure}"


def what_differs(store: dist.Store, others: list[int]) -> str:
    """The error line for ranks that differ from rank 0: which, where, and in what; if some of them
    have failed, for the first of those.
    """
    for rank in others:
        statement = statement_of(store, rank)
        if statement.failure:
            return cannot_start(rank, statement)
    rank = others[0]
    first, other = statement_of(store, 0), statement_of(store, rank)
    names = [
        name
        for name in sorted({**first.facts, **other.facts})
        if first.facts.get(name) != other.facts.get(name)
    ]
    parts = []
    for name in names[:MOST_FACTS]:
        there, here = (each.get(name, "not set") for each in (other.facts, first.facts))
        parts.append(f"{name} is {there} there and {here} on rank 0")
    if len(names) > MOST_FACTS:
        parts.append(f"{len(names) - MOST_FACTS} more differences")
    more = ""
    if len(others) > 1:
        named = ", ".join(map(str, others[1:MOST_RANKS]))
        rest = " and others" if len(others) > MOST_RANKS else ""
        more = f"; ranks {named}{rest} differ from rank 0 too"
    return (
        f"rank {rank} (host {other.host}) was started differently from rank 0 (host {first.host}): "
        f"{'; '.join(parts)}{more}. Start all ranks with the same config, code and data"
    )


def statement_of(store: dist.Store, rank: int) -> Statement:
    """What a rank has written."""
    return Statement(**json.loads(store.get(f"facts/{rank}")))
