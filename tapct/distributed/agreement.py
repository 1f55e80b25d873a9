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
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch.distributed as dist

from tapct.base.exits import SharedError, UserError
from tapct.base.ranks import Ranks

MOST_FACTS = 3  # differences that the error line names
MOST_RANKS = 4  # ranks that it names
LEAVE_S = 10.0  # the first rank keeps the store for so long until the others have read the verdict


def agree(
    store: dist.Store,
    place: Ranks,
    facts: Mapping[str, str],
    first: Callable[[], object],
    patience: datetime.timedelta,
) -> None:
    """Return on every rank, or raise on every rank.

    Args:
        store: key-value store at which the ranks met.
        place: place of this process.
        facts: name -> value; all ranks must have the same ones.
        first: function that the first rank calls once the facts are equal; its error ends all
            ranks.
        patience: time within which the verdict must come.
    Raises:
        UserError: ranks differ, or `first` has raised.
    """
    text = json.dumps(dict(facts), sort_keys=True)
    store.set(f"facts/{place.rank}", json.dumps([socket.gethostname(), dict(facts)]))
    store.set(f"digest/{place.rank}", hashlib.sha256(text.encode()).hexdigest())
    if not place.is_first:
        store.wait(["verdict"], patience)
        line, others = json.loads(store.get("verdict"))
        store.set(f"heard/{place.rank}", "yes")
        if line:
            # only the first rank and those that differ print it, once each
            raise UserError(line) if place.rank in others else SharedError(line)
        return
    others = different_ranks(store, place.world, patience)
    failure: Exception | None = None
    if others:
        failure = UserError(what_differs(store, others))
    else:
        try:
            first()
        except (UserError, OSError) as error:
            failure = error
    line = "" if failure is None else str(failure) or type(failure).__name__
    store.set("verdict", json.dumps([line, others]))
    with suppress(dist.DistError, RuntimeError):  # a rank that has ended has heard nothing
        heard = [f"heard/{rank}" for rank in range(1, place.world)]
        store.wait(heard, datetime.timedelta(seconds=LEAVE_S))
    if failure is not None:
        raise failure


def different_ranks(store: dist.Store, world: int, patience: datetime.timedelta) -> list[int]:
    """Ranks whose digest is not that of rank 0."""
    store.wait([f"digest/{rank}" for rank in range(world)], patience)
    digests = [store.get(f"digest/{rank}") for rank in range(world)]
    return [rank for rank, digest in enumerate(digests) if digest != digests[0]]


def what_differs(store: dist.Store, others: list[int]) -> str:
    """The error line for ranks that differ from rank 0: which, where, and in what."""
    host, facts = json.loads(store.get("facts/0"))
    rank = others[0]
    other_host, other_facts = json.loads(store.get(f"facts/{rank}"))
    names = [
        name
        for name in sorted({**facts, **other_facts})
        if facts.get(name) != other_facts.get(name)
    ]
    parts = []
    for name in names[:MOST_FACTS]:
        there, here = (each.get(name, "not set") for each in (other_facts, facts))
        parts.append(f"{name} is {there} there and {here} on rank 0")
    if len(names) > MOST_FACTS:
        parts.append(f"{len(names) - MOST_FACTS} more differences")
    more = ""
    if len(others) > 1:
        named = ", ".join(map(str, others[1:MOST_RANKS]))
        rest = " and others" if len(others) > MOST_RANKS else ""
        more = f"; ranks {named}{rest} differ from rank 0 too"
    return (
        f"rank {rank} (host {other_host}) was started differently from rank 0 (host {host}): "
        f"{'; '.join(parts)}{more}. Start all ranks with the same config, code and data"
    )
