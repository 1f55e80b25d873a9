"""An export is loaded and a scan embedded where only torch and the readers are installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from scan_files import noise_ct, save_scan

from tapct.config.plugins import Plugin
from tapct.data.scans.ingest import read_volume
from tapct.eval.features.preprocess import Preprocess
from tapct.models import vit
from tapct.types import HUContract
from tapct.weights.card import FeatureSettings
from tapct.weights.export import save_export
from tapct.weights.pretrained import load_pretrained

OPTIONAL = (
    "wandb", "fvcore", "submitit", "tensorboard", "typer", "rich", "matplotlib", "PIL", "sklearn",
    "scipy", "surface_distance", "h5py", "zarr", "transformers", "tokenizers", "huggingface_hub",
    "monai", "highdicom", "pyarrow", "blosc2", "pandas", "torchvision", "xformers", "yacs", "tqdm",
)  # fmt: skip
PROGRAM = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

OPTIONAL = set(sys.argv[4].split(","))
sys.meta_path.insert(0, Blocked())
for name in OPTIONAL:  # the block is one
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was not blocked")
import tapct
pretrained = tapct.load_pretrained(sys.argv[1])
volume = tapct.read_volume(Path(sys.argv[2]))
features = pretrained.embed(volume)
features.write_npz(Path(sys.argv[3]))
import numpy, torch
same = pretrained.embed(volume.hu_ZYX, spacing_mm=volume.spacing_mm, blocks=[0])
assert numpy.array_equal(features.features_DZYX, same.block[0])
assert features.to_voxels()[:, 0].shape == (16, *volume.hu_ZYX.shape[1:])
assert features.centres_mm.shape[-1] == 3
crops = torch.zeros(1, 1, 4, 16, 16)
assert pretrained.get_intermediate_layers(crops, 1, reshape=True)[0].shape == (1, 16, 2, 4, 4)
assert len(tapct.PyramidEncoder(pretrained, (4, 8))(crops)) == 2
assert tapct.Volume is type(volume)
"""


def test_an_export_embeds_a_scan_without_optional_packages(tmp_path: Path) -> None:
    config = vit.Config(window=(4, 16, 16), patch=(2, 4, 4), dim=16, depth=1, heads=2)
    model = vit.build(config)
    model.init_weights(3)
    preprocess = Preprocess((24, 24), (4, 16, 16), (4, 16, 16))
    settings = FeatureSettings(Plugin("vit", config), HUContract(), preprocess)
    save_export(tmp_path / "export", model, settings, {})
    scan, out = tmp_path / "scan.nii.gz", tmp_path / "features.npz"
    save_scan(scan, noise_ct(1))
    line = [sys.executable, "-c", PROGRAM, tmp_path / "export", scan, out, ",".join(OPTIONAL)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = load_pretrained(tmp_path / "export").embed(read_volume(scan))
    with np.load(out) as features:
        np.testing.assert_allclose(
            features["features_DZYX"], expected.features_DZYX, rtol=1e-4, atol=1e-5
        )
        assert np.abs(features["cls_D"]).max() > 0
