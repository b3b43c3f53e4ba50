"""What is learnt: tensors in, tensors out."""

from mgfc.calibrators.coarse import CoarseCalib
from mgfc.calibrators.fine import FineCalib
from mgfc.calibrators.layer import CalibLayer
from mgfc.calibrators.medium import MediumCalib
from mgfc.calibrators.rein import ReinCalib

__all__ = ["CalibLayer", "CoarseCalib", "FineCalib", "MediumCalib", "ReinCalib"]
