"""What is published for these experiments, with DINOv2-L and Mask2Former's head; all read in the source that is named."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """A row of a paper's table.

    Args:
        method: its name here, or in the paper if it is not here.
        experiment: a name in `EXPERIMENTS`.
        source: where the figures stand.
        miou: by the target's name; those that the source does not give are left out.
        mean: over the targets, if the source gives it.
        note: what is different from the other rows.
    """

    method: str
    experiment: str
    source: str
    miou: dict[str, float] = field(default_factory=dict)
    mean: float | None = None
    note: str = ""


def _cities(cityscapes: float, bdd: float, mapillary: float) -> dict[str, float]:
    return {"Cityscapes": cityscapes, "BDD100K": bdd, "Mapillary": mapillary}


REIN = "[Rein](https://arxiv.org/abs/2312.04265)"
REIN_README = "[Rein's README](https://github.com/w1oves/Rein)"
ISSUE = "[an author of SoMA, on repeating Rein](https://github.com/w1oves/Rein/issues/48)"
SOMA_README = "[SoMA's README](https://github.com/ysj9909/SoMA)"
MFUSER = "[MFuser](https://arxiv.org/abs/2504.03193), Table 1"
PUBLISHED = (
    Published("frozen", "gta5", f"{REIN}, Table 1", _cities(63.3, 56.1, 63.9), 61.1),
    Published("frozen", "gta5", ISSUE, mean=63.44, note="the best of several runs"),
    Published("full", "gta5", ISSUE, mean=61.5),
    Published("rein", "gta5", f"{MFUSER}, quoting {REIN}", _cities(66.40, 60.40, 66.10), 64.30),
    Published("SET", "gta5", f"{MFUSER}, quoting [SET](https://arxiv.org/abs/2407.18568)", _cities(68.06, 61.64, 67.68), 65.79),
    Published("SoMA", "gta5", SOMA_README, mean=68.27),
    Published("rein", "gta5_synthia", REIN_README, {"Cityscapes": 72.2}),
    Published("SoMA", "gta5_synthia", SOMA_README, mean=69.26),
    Published("rein", "acdc", REIN_README, mean=77.6, note="crops of 1024, ACDC's test set"),
    Published("SoMA", "acdc", SOMA_README, mean=78.75, note="crops of 1024, ACDC's test set"),
)
