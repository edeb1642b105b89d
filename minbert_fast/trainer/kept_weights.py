# SPDX-License-Identifier: Apache-2.0
"""The weights that later stages of a run start from (`training.start`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from minbert_fast.trainer.checkpoint import Checkpoint, copy_weights, set_weights

PREFIX = "kept/"  # start of their names in a checkpoint


class KeptWeights:
    """Copies of a model's weights: "best" of the present stage, or by the number of a finished stage (0: before the first).

    `starts` has the name of the weights that each stage starts from; weights that no later stage needs are not kept.
    """

    def __init__(self, model: nn.Module, starts: Sequence[str]) -> None:
        self._model = model
        self._starts = list(starts)
        self._weights: dict[str, dict[str, Tensor]] = {}

    def keep(self, name: str, first: int) -> None:
        """Copies the model's weights now, if stage `first` or one after it starts from the weights called `name`."""
        if name in self._starts[first:]:
            self._weights[name] = copy_weights(self._model)

    def begin_stage(self, index: int) -> bool:
        """Gives the model the first weights of stage `index`. False: these are "best", and there are none."""
        self.keep(str(index), index)  # the last weights of the stage that has just ended
        start = self._starts[index]
        found = start in self._weights
        if found:
            set_weights(self._model, self._weights[start])
        self._weights = {n: w for n, w in self._weights.items() if n != "best" and n in self._starts[index + 1 :]}
        return found or start != "best"

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint. A resumed run finds those before the first stage by itself."""
        kept = {name: weights for name, weights in self._weights.items() if name != "0"}
        return {f"{PREFIX}{name}/{key}": tensor for name, weights in kept.items() for key, tensor in weights.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes the weights from a checkpoint."""
        for key, tensor in checkpoint.tensors.items():
            if key.startswith(PREFIX):
                name, _, parameter = key.removeprefix(PREFIX).partition("/")
                self._weights.setdefault(name, {})[parameter] = tensor
