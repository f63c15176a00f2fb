"""The batch statistics of normalization layers, as numbers. For any PyTorch model."""

from .advice import THRESHOLDS, Advice, Thresholds, advise
from .diagnosis import Diagnosis, LayerDiagnosis, diagnose
from .recorder import Record, StatisticsRecorder, can_be_recorded, select_norms

__all__ = [
    "THRESHOLDS",
    "Advice",
    "Diagnosis",
    "LayerDiagnosis",
    "Record",
    "StatisticsRecorder",
    "Thresholds",
    "advise",
    "can_be_recorded",
    "diagnose",
    "select_norms",
]
