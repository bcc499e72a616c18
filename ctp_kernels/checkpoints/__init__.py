"""Read and write packed models."""

from .export import LAYOUTS as LAYOUTS
from .export import RECORD as RECORD
from .export import export_model as export_model
from .load import cast_model as cast_model
from .load import find_folder as find_folder
from .load import forget_packing as forget_packing
from .load import is_packed as is_packed
from .load import load_packed as load_packed
from .load import repack as repack
from .manifest import MANIFEST as MANIFEST
from .manifest import METHOD as METHOD
from .manifest import read_manifest as read_manifest
from .manifest import save_as_packed as save_as_packed
from .manifest import save_packed as save_packed
