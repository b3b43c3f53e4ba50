"""Pictures of what calibration does to an image: `record` measures it, the `plot_` functions draw it.

`record` needs nothing beside the library; the plots need Matplotlib (`pip install "mgfc[viz]"`).
"""

from mgfc.viz.figures import (
    plot_change,
    plot_coarse,
    plot_features,
    plot_fine,
    plot_medium,
    plot_overview,
    plot_prediction,
)
from mgfc.viz.measure import record
from mgfc.viz.records import CoarseRecord, FineRecord, MediumRecord, Record

__all__ = [
    "CoarseRecord",
    "FineRecord",
    "MediumRecord",
    "Record",
    "plot_change",
    "plot_coarse",
    "plot_features",
    "plot_fine",
    "plot_medium",
    "plot_overview",
    "plot_prediction",
    "record",
]
