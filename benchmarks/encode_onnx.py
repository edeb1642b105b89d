# SPDX-License-Identifier: Apache-2.0
"""Times `encode --onnx` against sentence-transformers' ONNX backend on the same exported graph, in one process.

The weights and texts are those of benchmarks/encode.py, MiniLM-L6's size. sentence-transformers needs optimum-onnx for its
backend; without it that row says so. Its batch size is the best of several. A candidate passes if the cosine of every vector
with that of the native encoder in fp32 is at least 0.999.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import encode, harness
from benchmarks.harness import Candidate, Ceilings, Row
from minbert_fast import Predictor
from minbert_fast.data import Tokenizer
from minbert_fast.tasks import exporting
from minbert_fast.tasks.exporting.onnx_model import GRAPH, OnnxModel

SHAPE = "MiniLM-L6"


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """The rows of one shape in fp32, on the CPU."""
    if device.type != "cpu":
        yield Row("encode_onnx", SHAPE, "all", note="measured on CPUs")
        return
    with tempfile.TemporaryDirectory() as folder:
        directory, weights = encode.model_directory(SHAPE, Path(folder))
        texts, source = encode.sentences(encode.COUNT["cpu"][SHAPE], Tokenizer.from_pretrained(directory))
        native = Predictor.from_pretrained(directory, device="cpu", precision="fp32")
        graph = Path(folder) / "graph"
        graph.mkdir()
        exporting.write_onnx(graph, native, None, int8=False)
        expected = native.encode(texts)
        ours = OnnxModel.from_pretrained(graph, device="cpu")
        timed = {
            "ours, encode --onnx": lambda: ours.encode(texts),
            "ours, encode (no ONNX)": lambda: native.encode(texts),
        }
        baselines = []
        if importlib.util.find_spec("optimum") is None:
            name = "sentence-transformers, ONNX backend"
            yield Row("encode_onnx", SHAPE, name, note="needs optimum-onnx, which needs transformers below 4.58")
        else:
            from sentence_transformers import SentenceTransformer

            theirs = SentenceTransformer(
                str(graph),
                device="cpu",
                backend="onnx",
                model_kwargs={"file_name": GRAPH, "provider": "CPUExecutionProvider"},
            )
            best = encode.best_batch_size(theirs, texts[: encode.PILOT], device)
            baselines = [f"sentence-transformers, ONNX backend, batch {best}"]
            timed[baselines[0]] = partial(encode.encode_with, theirs, texts, best)
        candidates = {
            name: Candidate(function, partial(lambda f: encode.check_cosines(f(), expected), function))
            for name, function in timed.items()
        }
        case = f"{SHAPE} ({weights}), {len(texts):,} {source}"
        yield from harness.case("encode_onnx", case, candidates, device, ceilings, baselines=baselines, product="fp32")
