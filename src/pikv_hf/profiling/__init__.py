"""`pikv profile`: which KV heads of a model must read everything, from what they do on texts."""

from .effect import QUERIES, HeadEffect
from .job import Job
from .needles import needle_pieces
from .run import profile

__all__ = ["QUERIES", "HeadEffect", "Job", "needle_pieces", "profile"]
