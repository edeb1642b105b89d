# SPDX-License-Identifier: Apache-2.0
"""One training step: flat parameters and J, the one-pass step, the naive step, the captured step, AdamW."""
