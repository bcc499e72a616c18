"""Build libctp_cpu, and libctp_cuda where there is nvcc, beside the Python files; all else is in pyproject.toml.

Without a compiler the install goes on: the package then says what is missing, and its other backends run.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("_build", ROOT / "ctp_kernels" / "_build.py")
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)  # not through the package, which imports torch


class build_kernels(Command):
    """Compile the libraries into ctp_kernels/lib, and put their sources into a wheel for later compilation."""

    description = "compile csrc/ into ctp_kernels/lib"
    user_options = ()
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None
        self.build_temp = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))

    def run(self):
        package = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "ctp_kernels"
        _build.build_all(package, Path(self.build_temp).resolve())
        if not self.editable_mode:
            for source in self.get_source_files():
                target = package / source
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / source, target)

    def get_source_files(self):
        return [str(p.relative_to(ROOT)) for name in ("cpu", "cuda") for p in _build.sources(name)]

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class any_python_wheel(bdist_wheel):
    """One wheel for every Python and torch of a platform: the libraries know neither."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class platform_distribution(Distribution):
    def has_ext_modules(self):
        return True


build.sub_commands.append(("build_kernels", None))
setup(
    distclass=platform_distribution,
    cmdclass={"build_kernels": build_kernels, "bdist_wheel": any_python_wheel},
)
