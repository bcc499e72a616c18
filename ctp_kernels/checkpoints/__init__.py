"""Read and write packed models."""

from .manifest import MANIFEST as MANIFEST
from .manifest import load_packed as load_packed
from .manifest import read_manifest as read_manifest
from .manifest import save_packed as save_packed
