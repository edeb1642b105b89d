# SPDX-License-Identifier: Apache-2.0
"""The package's version, in the one place that build, docs and result files read it from."""

__version__ = "0.1.0"
