"""What is learnt or measured: tensors in, tensors out."""

from mgfc.calibrators.coarse import CoarseCalib
from mgfc.calibrators.fine import FineCalib
from mgfc.calibrators.layer import CalibLayer
from mgfc.calibrators.low_rank import LowRank
from mgfc.calibrators.medium import MediumCalib
from mgfc.calibrators.rein import ReinCalib

__all__ = ["CalibLayer", "CoarseCalib", "FineCalib", "LowRank", "MediumCalib", "ReinCalib"]
