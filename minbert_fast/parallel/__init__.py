# SPDX-License-Identifier: Apache-2.0
"""Several processes: the world they form, what they exchange in a step, and how they share J and the moments."""
