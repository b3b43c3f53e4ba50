"""What an installed mgfc has to do in an environment that holds nothing else of this repository.

python .github/smoke.py VERSION
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch

import mgfc

REPOSITORY = Path(__file__).resolve().parents[1]


def build() -> torch.nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def main(version: str) -> None:
    place = Path(mgfc.__file__).resolve()
    assert REPOSITORY not in place.parents or "site-packages" in place.parts, f"mgfc is that of the repository: {place}"
    assert mgfc.__version__ == version, (mgfc.__version__, version)
    assert (place.parent / "py.typed").exists()
    images = torch.randn(2, 3, 32, 32)
    bare = build().eval().forward_features(images)
    vit = mgfc.wrap_backbone(build()).eval()
    assert torch.equal(vit.forward_features(images), bare), "fresh calibrators change nothing"
    with torch.no_grad():
        for parameter in vit.calibration.parameters():
            parameter.normal_(std=0.1)
    expected = vit.forward_features(images)
    with tempfile.TemporaryDirectory() as folder:
        head = mgfc.SegmentationHead([32], num_classes=5)
        vit.calibration.save_pretrained(folder, head=head)
        loaded = mgfc.wrap_backbone(build(), folder).eval()
        assert torch.equal(loaded.forward_features(images), expected), "an adapter is read as it was written"
        assert mgfc.load_head(folder).classify.out_channels == 5
        for command in (["mgfc", "info", folder], [sys.executable, "-m", "mgfc", "--help"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    print(f"mgfc {version} at {place.parent} works")


if __name__ == "__main__":
    main(*sys.argv[1:])
