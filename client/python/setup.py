"""Builds the gRPC stubs before the package is collected; everything else is in pyproject.toml."""

import pathlib
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from generate import generate


class BuildWithStubs(build_py):
    """Generates longspan/v1 for wheels and editable installs alike."""

    def finalize_options(self):
        generate()
        super().finalize_options()


setup(cmdclass={"build_py": BuildWithStubs})
