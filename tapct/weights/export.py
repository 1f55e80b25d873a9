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
from tapct.weights.card import WEIGHTS_FILE, ExportCard, FeatureSettings


def save_export(
    out: Path, model: nn.Module, settings: FeatureSettings, provenance: Mapping[str, Any]
) -> None:
    """Write an export folder whole or not at all; an older folder of that name is replaced.

    Args:
        out: export folder to write.
        model: backbone of the teacher.
        settings: section that the backbone was built from, HU contract and preprocessing.
        provenance: JSON values, e.g. run name, step, data digest; versions of tapct and torch are
            added.
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
            ExportCard(settings, provenance, digest).write(folder)
            # an export is made to be given to others, whatever the umask
            folder.chmod(0o755)
            for file in folder.iterdir():
                file.chmod(files.SHARED)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the export {out}: {files.first_cause(error)}") from error
