# SPDX-License-Identifier: Apache-2.0
"""The package's version; the build, the docs and result files read it here."""

__version__ = "0.1.0"
