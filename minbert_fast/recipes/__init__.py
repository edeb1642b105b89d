# SPDX-License-Identifier: Apache-2.0
"""Recipes: one experiment as data, and every experiment that ships with the package as a TOML file."""
