"""Columns of an archive in some bytes per scan, and sets of patients in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

HASH = "S16"  # type of keyed hashes in an array


def number_of(text: str) -> int:
    """A number of 64 bits for a text, 0 for an empty one: equal texts have equal numbers, and
    different ones do not in practice. As the ids of scans, it is a hash.
    """
    if not text:
        return 0
    content = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def hashes(texts: Iterable[str]) -> np.ndarray:
    """Keyed hashes as an array of bytes."""
    return np.array([text.encode() for text in texts], HASH)


def roots(num: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The smallest member of the set of each number.

    Args:
        num: the numbers are those below it.
        one, other: pairs of numbers that are in one set.
    Returns:
        int64 of length `num`.
    """
    root = np.arange(num)
    while True:
        first, second = root[one], root[other]
        differ = first != second
        if not differ.any():
            return root
        low, high = np.minimum(first, second)[differ], np.maximum(first, second)[differ]
        np.minimum.at(root, high, low)
        while True:  # until each number points to the root of its set
            shorter = root[root]
            if np.array_equal(shorter, root):
                break
            root = shorter


def pairs_of_equal(numbers: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places with equal numbers, each with the next one.

    Args:
        numbers: uint64; 0 equals nothing.
        chosen: bool, the places that count.
    """
    places = np.flatnonzero(chosen & (numbers != 0))
    places = places[np.argsort(numbers[places], kind="stable")]
    is_equal = numbers[places[1:]] == numbers[places[:-1]]
    return places[:-1][is_equal], places[1:][is_equal]


def unique_rows(*columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """The different rows of some columns of one length, sorted by the first column, then by the
    second one, and so on.
    """
    order = np.lexsort(columns[::-1])
    columns = tuple(column[order] for column in columns)
    is_new = np.ones(len(order), bool)
    if len(order):
        is_new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return tuple(column[is_new] for column in columns)


def is_in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each of a few values is in a large sorted array; bool."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[places] == values)


def runs(ascending: np.ndarray) -> Iterator[slice]:
    """The parts of a sorted array with equal values."""
    if len(ascending):
        starts = np.flatnonzero(ascending[1:] != ascending[:-1]) + 1
        yield from map(slice, [0, *starts.tolist()], [*starts.tolist(), len(ascending)])
