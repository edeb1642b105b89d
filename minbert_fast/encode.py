# SPDX-License-Identifier: Apache-2.0
"""Writes the vectors of sentences to a file.

python -m minbert_fast.encode --model DIR --input sentences.txt --output vectors.npy
python -m minbert_fast.encode --model DIR --input questions.csv --column question1 --output vectors.safetensors --normalize
python -m minbert_fast.encode --onnx DIR --input sentences.txt --output vectors.npy

Writes one vector per line of a text file (- reads standard input), or per row of one column of a .csv, .tsv, .jsonl or
.parquet file.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minbert_fast.common.cli import Parser, add_device_flags, add_import_flag, run
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import ArrayFile, whole_file
from minbert_fast.data.sentence_files import read_sentences
from minbert_fast.tasks.exporting.onnx_model import OnnxModel
from minbert_fast.tasks.inference.predictor import Predictor

TENSOR = "embeddings"  # the tensor's name in a .safetensors file


def parser() -> argparse.ArgumentParser:
    flags = Parser("encode", __doc__ or "")
    add = flags.add_argument
    models = flags.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", metavar="DIR|HUB_NAME", help="trained, Hugging Face or sentence-transformers model")
    models.add_argument("--onnx", type=Path, metavar="DIR", help="what export --format onnx wrote; runs in onnxruntime")
    sentences = ".txt with one sentence per line, .csv, .tsv, .jsonl, .parquet, or -"
    add("--input", type=Path, required=True, metavar="FILE", help=sentences)
    add("--output", type=Path, required=True, metavar="FILE", help=".npy or .safetensors, fp32 [n, hidden]")
    add("--column", metavar="NAME", help="column of a table (default: text, sentence, or the only one)")
    add("--pooling", choices=("mean", "cls", "max"), help="(default: the model's own, else mean)")
    add("--normalize", action=argparse.BooleanOptionalAction, help="scale to length 1 (default: the model's setting)")
    add_import_flag(flags)
    add_device_flags(flags)
    return flags


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    if options.output.suffix not in (".npy", ".safetensors"):
        raise ConfigError(f"--output {options.output}: expected a name that ends in .npy or .safetensors")
    chunks = read_sentences(options.input, options.column)
    first = next(chunks, [])  # reports mistakes in the input before the slow loading of the model
    if options.onnx and options.precision != "auto":
        raise ConfigError(f"--precision {options.precision}: an ONNX graph has its own (export --int8)")
    model: Predictor | OnnxModel = (
        OnnxModel.from_pretrained(options.onnx, device=options.device)
        if options.onnx
        else Predictor.from_pretrained(options.model, device=options.device, precision=options.precision)
    )
    name = TENSOR if options.output.suffix == ".safetensors" else None
    with (
        whole_file(options.output) as file,
        ArrayFile(file, model.width, name) as rows,
        tqdm(unit=" sentences", file=sys.stderr, disable=None, leave=False) as bar,
    ):
        for sentences in itertools.chain([first], chunks):
            found = model.encode(sentences, pooling=options.pooling, normalize=options.normalize, progress=bar.update)
            rows.write(found)
    cut = f", {model.truncated:,} sentences cut to {model.max_length} tokens" if model.truncated else ""
    print(f"{options.output}: {rows.rows:,} vectors of {model.width}{cut}")


if __name__ == "__main__":
    sys.exit(run(main))
