# SPDX-License-Identifier: Apache-2.0
"""Builds the extension `minbert_fast._C` from csrc/ (metadata lives in pyproject.toml)."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "minbert_fast._C",
            sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ],
)
