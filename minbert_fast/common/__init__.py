# SPDX-License-Identifier: Apache-2.0
"""Shared by all rooms: atomic file writes, checked options, errors, devices and versions."""
