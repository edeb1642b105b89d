# SPDX-License-Identifier: Apache-2.0
"""Recipes: one experiment as data; the shipped experiments are the TOML files of this folder."""
