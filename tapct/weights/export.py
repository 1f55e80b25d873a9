"""Write the teacher as safetensors with a JSON card, for `tapct.load_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from tapct.base import files
from tapct.base.exits import UserError
from tapct.data.packed import trained_on
from tapct.data.packed.trained_on import TrainedOn
from tapct.run_folder import ExportFolder
from tapct.weights.card import WEIGHTS_FILE, ExportCard, FeatureSettings, provenance_of

LIST_SHA256 = "trained_on_sha256"  # in the provenance of the card


def save_export(
    out: Path,
    model: nn.Module,
    settings: FeatureSettings,
    provenance: Mapping[str, Any],
    scans: TrainedOn | None = None,
) -> None:
    """Write an export folder whole or not at all; an older folder of that name is replaced.

    Args:
        out: export folder to write.
        model: backbone of the teacher.
        settings: section that the backbone was built from, HU contract and preprocessing.
        provenance: JSON values, e.g. run name, step, data digest; versions of tapct and torch are
            added.
        scans: scans that the weights have been trained on; None where unknown.
    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    # a copy of each tensor: safetensors refuses tensors that share memory
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    try:
        with files.replacing_folder(out) as folder:
            save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            digest = files.sha256(folder / WEIGHTS_FILE)
            about = dict(provenance)
            if scans is not None:
                path = ExportFolder(folder).trained_on
                scans.write(path)
                about[LIST_SHA256] = files.sha256(path)
            ExportCard(settings, about, digest).write(folder)
            # an export is made to be given to others, whatever the umask
            folder.chmod(0o755)
            for file in folder.iterdir():
                file.chmod(files.SHARED)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the export {out}: {files.first_cause(error)}") from error


def scans_of_export(folder: Path) -> TrainedOn:
    """The scans that the weights of an export have been trained on; incomplete, with the reason,
    where the folder is no export of a version that lists them.
    """
    export = ExportFolder(folder)
    if not export.trained_on.is_file():
        reason = f"the weights {folder.name} come without a list of the scans of pretraining"
        return TrainedOn(unknown=(reason,))
    if files.sha256(export.trained_on) != provenance_of(folder).get(LIST_SHA256):
        reason = f"the list of the scans of pretraining of {folder.name} is not that of its card"
        return TrainedOn(unknown=(reason,))
    return trained_on.read(export.trained_on)
