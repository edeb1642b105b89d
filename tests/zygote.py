# SPDX-License-Identifier: Apache-2.0
"""A process that has imported everything, and forks a training process for each line of arguments that it reads.

So a test can start and kill training dozens of times without paying for as many imports of torch. Speaks JSON lines:
reads a list of arguments, answers {"pid": ...} at once and {"status": ...} when that process has ended.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

import torch

from minbert_fast import train
from minbert_fast.common import cli


def warm_up() -> None:
    """Takes one step, so that all modules are imported before the fork."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--output", folder, "--max-steps", "1", "--precision", "fp32", "--set", f"data.cache={folder}/cache"]
        status = cli.run(train.main, [*flags, "--set", "training.evaluate_untrained=false"])
        assert status == 0


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps the output of training apart from the answers
    warm_up()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(cli.run(train.main, json.loads(line)))
        print(json.dumps({"pid": pid}), file=answers)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers)


if __name__ == "__main__":
    main()
