"""Decide the codes, values and masks of compressed weights."""

from .solver import METHODS as METHODS
from .solver import Solution as Solution
from .solver import solve as solve
from .walk import CompressReport as CompressReport
from .walk import LayerRow as LayerRow
from .walk import compress_model as compress_model
