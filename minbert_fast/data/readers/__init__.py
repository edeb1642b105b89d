# SPDX-License-Identifier: Apache-2.0
"""One file per format: each reads a file as records, (line number, values of the wanted columns)."""
