"""mgfc: adapt frozen vision foundation models to dense prediction that survives a change of domain.

An implementation of the published description of Multi-Granularity Feature Calibration (arXiv 2508.03007).
"""

from mgfc._version import __version__
from mgfc.blocks import BlockReport
from mgfc.calibration import Calibration
from mgfc.calibrators import CalibLayer, CoarseCalib, FineCalib, MediumCalib, ReinCalib
from mgfc.config import CoarseConfig, FineConfig, MediumConfig, MGFCConfig, ReinConfig
from mgfc.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNotFoundError,
    CalibrationError,
    ConfigError,
    LabelError,
    MGFCError,
    UnsupportedBackboneError,
)
from mgfc.features import FeatureMaps
from mgfc.heads import SegmentationHead
from mgfc.storage.loading import load_head
from mgfc.wrapping import get_calibration, unwrap_backbone, wrap_backbone

__all__ = [
    "AdapterFileError",
    "AdapterMismatchError",
    "AdapterNotFoundError",
    "BlockReport",
    "CalibLayer",
    "Calibration",
    "CalibrationError",
    "CoarseCalib",
    "CoarseConfig",
    "ConfigError",
    "FeatureMaps",
    "FineCalib",
    "FineConfig",
    "LabelError",
    "MGFCConfig",
    "MGFCError",
    "MediumCalib",
    "MediumConfig",
    "ReinCalib",
    "ReinConfig",
    "SegmentationHead",
    "UnsupportedBackboneError",
    "__version__",
    "get_calibration",
    "load_head",
    "unwrap_backbone",
    "wrap_backbone",
]
