"""`pikv calibrate`: fitting the compressors that need it to a model and texts."""

from .fit import Fit, mean_errors
from .job import METHODS, Job
from .run import calibrate, text_pieces

__all__ = ["METHODS", "Fit", "Job", "calibrate", "mean_errors", "text_pieces"]
