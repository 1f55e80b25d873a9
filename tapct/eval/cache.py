"""The feature cache: frozen features on disk, computed once for all tasks and evaluations.

    FOLDER/MODEL/SCAN-BLOCK.features     features of one scan after one block
    FOLDER/MODEL/model.json              what the key MODEL stands for
    FOLDER/in_use/*.json                 one file per evaluation that runs: the models that it uses

MODEL is a hash of all that features depend on beside the scan: weights, backbone, HU contract,
preprocessing, precision and version. SCAN is the digest of the voxels, and of the spacing where the
model works in mm. So an entry never changes: several processes may write the same one, and the last
one stays.

The cache is bounded: beyond the quota, the entries that were used least recently (by their time of
modification, which is set at each use) are removed, but none of a model that an evaluation uses.
The file of an evaluation that was killed counts for `STALE_S` seconds. An entry that vanishes or is
damaged is computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

import tapct
from tapct.base import console, files
from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.config import setting
from tapct.eval.features import entry_file
from tapct.eval.features.dense import BlockFeatures, PatchGrid, WindowVectors
from tapct.eval.features.entry_file import FeatureWriter
from tapct.eval.features.extraction import patch_of
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.features.stopwatch import WRITE, Stopwatch
from tapct.nn.contracts import num_blocks_of
from tapct.types import HUContract

VERSION = 1  # raise it whenever equal weights and scans give other features
_FEATURE_CODE = (
    *(
        f"tapct.eval.features.{name}"
        for name in ("dense", "extraction", "prepared", "preprocess", "windows")
    ),
    "tapct.nn.attention",
    "tapct.nn.init",
    "tapct.views.resample",
)
GB = 10**9
STALE_S = 6 * 3600.0  # an evaluation without a heartbeat for this time counts as ended
LEFTOVER_S = 24 * 3600.0  # age of a half-written file whose process must have ended
_SUFFIX = ".features"
_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
_PRIVATE_FOLDER = 0o700  # features of patients are as private as their scans


@dataclass(frozen=True)
class Config:
    """Where features are kept."""

    path: str = setting(
        "",
        "folder of the feature cache, which several runs may share; empty: RUN/eval/features, or "
        "MODEL-eval/features for weights outside of a run folder",
    )
    quota_gb: float = setting(
        20.0,
        "maximum size of the feature cache in GB (10^9 bytes); if it is larger, the features that "
        "were used least recently are removed, except those of an evaluation that is running",
        gt=0,
    )


@dataclass(frozen=True)
class ModelKey:
    """What the features of a model depend on beside the scan.

    Args:
        text: 32 hex digits.
        facts: the same in words, for people.
        in_mm: whether the features depend on the spacing of a scan too.
    """

    text: str
    facts: Mapping[str, Any]
    in_mm: bool

    def scan(self, digest: str, spacing_mm: Sequence[float]) -> str:
        """Name of a scan among the entries of this model.

        Args:
            digest: digest of the voxels.
            spacing_mm: mm of the voxels along (z, y, x).
        """
        if not self.in_mm:
            return digest
        spacing = repr(tuple(float(mm) for mm in spacing_mm))
        return hashlib.blake2b(f"{digest} {spacing}".encode(), digest_size=16).hexdigest()


def model_key(
    model: nn.Module,
    contract: HUContract,
    preprocess: Preprocess,
    device: torch.device,
    weights: str = "",
) -> ModelKey:
    """The key of a model.

    Args:
        model: backbone; its config, if it has one, the file of its class, and the classes and plain
            attributes of all of its modules count.
        contract: HU to network input.
        preprocess: windows.
        device: device that it runs on; a GPU computes in bf16.
        weights: text that stands for the weights, where they are not loaded; empty to hash them.
    """
    config = getattr(model, "config", None)
    facts = {
        "backbone": f"{type(model).__module__}.{type(model).__qualname__}",
        "code": _code_digest(model),
        "modules": structure_digest(model),
        "config": repr(config) if dataclasses.is_dataclass(config) else "",
        "patch": patch_of(model),
        "num_blocks": num_blocks_of(model),
        "weights": weights or weights_digest(model),
        "contract": repr(contract),
        "preprocess": repr(preprocess),
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "tapct": tapct.__version__,
        "version": VERSION,
    }
    text = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    in_mm = bool(getattr(model, "needs_spacing", False)) or preprocess.needs_spacing
    return ModelKey(text, facts, in_mm)


def weights_digest(model: nn.Module) -> str:
    """Hash of names, types, shapes and values of all weights: 32 hex digits."""
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def structure_digest(model: nn.Module) -> str:
    """Hash of the classes and plain attributes of all modules, which the weights do not show: 32
    hex digits.

    A module with hooks, or with a function in place of a method, computes what nobody can hash: it
    gets a digest of its own at every call, so that its features are never taken for others.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__} ".encode())
        if module._forward_hooks or module._forward_pre_hooks:
            digest.update(secrets.token_bytes(16))
        for key, value in sorted(vars(module).items()):
            if key == "training" or key.startswith("_"):
                continue
            if inspect.isroutine(value):
                digest.update(secrets.token_bytes(16))
            elif isinstance(value, _PLAIN) or dataclasses.is_dataclass(value):
                digest.update(f"{key}={value!r} ".encode())
    return digest.hexdigest()


def _code_digest(model: nn.Module) -> str:
    """Hash of the files that decide about features: those of the classes of all modules, but for
    torch's own, and those that prepare scans, slide windows and set initial weights.
    """
    kinds = {type(module) for module in model.modules()}
    defined_in = {kind.__module__ for kind in kinds if kind.__module__.split(".")[0] != "torch"}
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted({*defined_in, *_FEATURE_CODE}):
        file = getattr(importlib.import_module(name), "__file__", None)
        content = Path(file).read_bytes() if file and Path(file).is_file() else b""
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


class CacheNotWritable(UserError):
    """The folder of the feature cache cannot be used: no fault of the model or the scan at work."""


class FeatureCache:
    """Features in a folder, which is made at the first write.

    Args:
        folder: folder of the cache.
        quota_gb: size that the cache may have.
    """

    def __init__(self, folder: Path | str, quota_gb: float) -> None:
        self.folder, self.quota = files.expand_path(folder), int(quota_gb * GB)
        self.sign = self.folder / "in_use" / f"{secrets.token_hex(8)}.json"
        self.used: set[Path] = set()

    def file(self, key: ModelKey, scan: str, block: int) -> Path:
        """Path of an entry, whether or not it exists."""
        return self.folder / key.text / f"{scan}-{block}{_SUFFIX}"

    def missing(self, key: ModelKey, scan: str, blocks: Collection[int]) -> tuple[int, ...]:
        """The blocks, ascending, that have no entry; the others count as used now."""
        absent = []
        for block in sorted(blocks):
            path = self.file(key, scan, block)
            try:
                os.utime(path)
            except FileNotFoundError:
                absent.append(block)
            except OSError as error:  # a file of another user keeps its time
                if not os.access(path, os.R_OK):
                    raise self.not_writable(error) from error
            self.used.add(path)
        return tuple(absent)

    def load(
        self, key: ModelKey, scan: str, block: int, device: torch.device | str
    ) -> tuple[BlockFeatures, PatchGrid] | None:
        """Read an entry.

        Returns:
            None where it is missing or damaged; a line about a damaged one is printed.
        """
        path = self.file(key, scan, block)
        try:
            found = entry_file.read(path, device)
        except FileNotFoundError:
            return None
        except entry_file.DamagedFeatures as error:
            console.say(f"the features in {path} are damaged ({error}); they are computed again")
            return None
        except OSError as error:
            raise UserError(
                f"the features in {path} cannot be read: {files.first_cause(error)}; choose "
                "another folder with eval.cache.path"
            ) from error
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def prepare(self, key: ModelKey, name: str) -> None:
        """Make the folder of a model.

        Args:
            key: key of the model.
            name: name of the model, for people.
        Raises:
            UserError: the folder cannot be written.
        """
        folder = self.folder / key.text
        try:
            self._make(folder)
            facts = json.dumps({"name": name, **key.facts}, indent=1) + "\n"
            files.write_atomically(folder / "model.json", facts, mode=files.PRIVATE)
        except OSError as error:
            raise self.not_writable(error) from error

    @contextlib.contextmanager
    def in_use(self, keys: Collection[ModelKey]) -> Iterator[None]:
        """Keep the entries of these models from removal, by this and other processes; at the end,
        the cache is brought below its quota.
        """
        content = json.dumps(sorted({key.text for key in keys}))
        try:
            self._make(self.sign.parent)
            files.write_atomically(self.sign, content, mode=files.PRIVATE)
            self.trim()
            yield
        except OSError as error:
            if error.filename and str(error.filename).startswith(str(self.folder)):
                raise self.not_writable(error) from error
            raise
        finally:
            with contextlib.suppress(OSError):
                self.sign.unlink()
            with contextlib.suppress(OSError):
                self.trim()

    def alive(self) -> None:
        """Show other processes that this evaluation still runs."""
        with contextlib.suppress(OSError):
            os.utime(self.sign)

    def trim(self) -> None:
        """Remove the entries that were used least recently until the cache is within its quota.

        Entries of models in use stay; the rest of an evaluation that was killed is removed.
        """
        now, protected = time.time(), self._protected()
        entries, total = [], 0
        for path, status in _files(self.folder):
            if path.name.startswith(".") and now - status.st_mtime > LEFTOVER_S:
                path.unlink(missing_ok=True)
                continue
            total += status.st_size
            if path.suffix == _SUFFIX and path.parent.name not in protected:
                entries.append((status.st_mtime, path, status.st_size))
        for _, path, size in sorted(entries):
            if total <= self.quota:
                break
            path.unlink(missing_ok=True)
            total -= size
            others = [one for one in path.parent.iterdir() if one.suffix == _SUFFIX]
            if not others:  # a process that writes there makes the folder again
                (path.parent / "model.json").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir()

    def size(self) -> int:
        """Bytes of all files in the cache."""
        return sum(status.st_size for _, status in _files(self.folder))

    def used_bytes(self) -> int:
        """Bytes of the entries that this evaluation asked for."""
        total = 0
        for path in self.used:
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def caveat(self) -> str:
        """A line where this evaluation alone needs more than the quota; else empty."""
        used = self.used_bytes()
        if used <= self.quota:
            return ""
        return (
            f"feature cache: the {counted(len(self.used), 'entry', 'entries')} of this evaluation "
            f"take {used / GB:.3g} GB, more than eval.cache.quota_gb={self.quota / GB:g}; the next "
            "evaluation will compute some of them again"
        )

    def not_writable(self, error: OSError) -> CacheNotWritable:
        """The error line where the folder cannot be used."""
        return CacheNotWritable(
            f"the feature cache {self.folder} cannot be written: {files.first_cause(error)}; "
            "choose another folder with eval.cache.path"
        )

    def _protected(self) -> set[str]:
        """Keys of the models that evaluations use now."""
        keys: set[str] = set()
        for path in (self.folder / "in_use").glob("*.json"):
            try:
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink(missing_ok=True)
                    continue
                keys.update(json.loads(path.read_text()))
            except (OSError, ValueError):
                continue
        return keys

    def _make(self, folder: Path) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for one in (self.folder, folder):
            one.mkdir(mode=_PRIVATE_FOLDER, exist_ok=True)


class CacheSink:
    """Writes the features of one scan into the cache, block by block; see `extraction.Sink`.

    Args:
        cache: cache.
        key: key of the model.
        scan: name of the scan, from `ModelKey.scan`.
        blocks: blocks that are written.
        grid: patch grid of the scan.
        what: model and scan, for error lines.
        stopwatch: where the seconds of writing are counted.
    """

    def __init__(
        self,
        cache: FeatureCache,
        key: ModelKey,
        scan: str,
        blocks: Collection[int],
        grid: PatchGrid,
        what: str,
        stopwatch: Stopwatch,
    ) -> None:
        self.cache, self.key, self.scan, self.grid = cache, key, scan, grid
        self.left = set(blocks)
        self.what, self.stopwatch = what, stopwatch
        self.writers: dict[int, FeatureWriter] = {}

    def rows(self, block: int, first: int, rows_ZYXD: torch.Tensor) -> None:
        """Write finished rows of patches."""
        with self.stopwatch.part(WRITE), self._explained():
            if block not in self.writers:
                path = self.cache.file(self.key, self.scan, block)
                path.parent.mkdir(mode=_PRIVATE_FOLDER, exist_ok=True)
                self.writers[block] = FeatureWriter(path, self.grid, self.what)
            self.writers[block].rows(first, rows_ZYXD)

    def finish(self, block: int, windows: WindowVectors) -> None:
        """Write the vectors of the windows; the entry exists from then on."""
        with self.stopwatch.part(WRITE), self._explained():
            self.writers.pop(block).finish(windows)
        self.left.discard(block)
        self.cache.alive()

    def abandon(self) -> None:
        """Remove what is half written."""
        for writer in self.writers.values():
            writer.abandon()
        self.writers.clear()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abandon()
            raise self.cache.not_writable(error) from error


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file in the folders of models, with its facts."""
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):  # removed by another process meanwhile
            if path.is_file():
                yield path, path.stat()
