"""Run compressed weights, forward and backward, from their packed bytes."""

from .errors import CTPError as CTPError
from .format import FORMATS as FORMATS
from .format import Format as Format
from .format import as_format as as_format
from .format import parse_format as parse_format
from .linear import PackedLinear as PackedLinear
from .packed import PackedWeight as PackedWeight
from .packed import pack as pack
from .packed import pack_codes as pack_codes
from .packed import pack_values as pack_values
from .patch import explain as explain
from .patch import patch_model as patch_model
from .patch import unpatch_model as unpatch_model

__version__ = "0.1.0"
