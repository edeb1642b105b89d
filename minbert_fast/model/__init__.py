# SPDX-License-Identifier: Apache-2.0
"""The drop-in encoder: its shape, its modules, its weights in and out, and sentence vectors from it."""
