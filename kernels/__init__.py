# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file an op: forward, backward, launcher. No `nn.Module`, no dispatch."""
