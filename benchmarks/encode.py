# SPDX-License-Identifier: Apache-2.0
"""Times sentence encoding, with tokenization, against sentence-transformers with the same weights and texts.

The texts are the distinct sentences of the course's dev files in random order (`MINBERT_FAST_DATA`, else ../shared/data),
or made-up words with lengths drawn from benchmarks/lengths.json. MiniLM-L6 has real weights if `MINBERT_FAST_MINILM` names
them; BERT-base has random ones. sentence-transformers, which sorts by length too, runs in fp32 and bf16 with the best of
several batch sizes, and on a GPU with the package flash-attn also without padding. packed-encoders (0.2.0, October 2026) is
no baseline: its `pack` takes ModernBERT and Qwen3.5, not BERT. A candidate passes if the cosine of every vector with that of
sentence-transformers in fp32 is at least 0.999.

FLOPs count 2 per token and weight of the encoder's products; attention would add 1 % at these lengths. Shares refer to the
rate of bf16 products, also for fp32 candidates.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks import harness
from benchmarks.gradients import CONFIGS
from benchmarks.harness import Candidate, Ceilings, Row
from minbert_fast import BertModel, Predictor
from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.formats import find_tables
from minbert_fast.model import sentence_modules
from minbert_fast.model.sentence_modules import SentenceModules

COUNT = {"cpu": {"MiniLM-L6": 2048, "BERT-base": 256}, "cuda": {"MiniLM-L6": 16_384, "BERT-base": 16_384}}
BATCH_SIZES = {"cpu": (32, 128), "cuda": (128, 512, 2048)}  # 32 is sentence-transformers' default
PILOT = 512  # sentences used to find the best batch size
COSINE = 0.999
PRECISIONS: tuple[Literal["fp32"], Literal["bf16"]] = ("fp32", "bf16")
MAX_LENGTH = 256
UNPADDED = "unpadded"  # FlashAttention over concatenated sentences


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """The rows of both shapes in fp32 and bf16."""
    with tempfile.TemporaryDirectory() as folder:
        for shape, counts in COUNT[device.type].items():
            directory, weights = model_directory(shape, Path(folder))
            texts, source = sentences(counts, Tokenizer.from_pretrained(directory))
            yield from _case(f"{shape} ({weights}), {len(texts):,} {source}", directory, texts, device, ceilings)


def _case(name: str, directory: Path, texts: list[str], device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        yield Row("encode", name, "all", note="sentence-transformers is not installed: left out")
        return
    theirs: dict[str, Callable[[], np.ndarray]] = {}
    for precision, options in ways(device).items():
        model = SentenceTransformer(str(directory), device=str(device), model_kwargs=options)
        if UNPADDED in precision and not getattr(model[0], "can_flatten_inputs", False):
            continue
        best = best_batch_size(model, texts[:PILOT], device)
        theirs[f"sentence-transformers {precision}, batch {best}"] = partial(encode_with, model, texts, best)
    if device.type == "cuda" and not any(UNPADDED in way for way in theirs):
        missing = f"sentence-transformers bf16 {UNPADDED}"
        yield Row("encode", name, missing, note="needs the package flash-attn and a sentence-transformers that unpads")
    baselines = list(theirs)
    expected = theirs[baselines[0]]()

    def candidate(function: Callable[[], np.ndarray]) -> Candidate:
        return Candidate(function, lambda: check_cosines(function(), expected), flops=flops)

    fp32, bf16 = (Predictor.from_pretrained(directory, device=str(device), precision=p) for p in PRECISIONS)
    tokenizer, config = fp32.tokenizer, fp32.encoder.config
    lengths = tokenizer.encode(texts, max_length=MAX_LENGTH).lengths
    products = config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    flops = 2 * products * int(lengths.sum())
    candidates = {name: candidate(function) for name, function in theirs.items()}
    candidates |= {
        "ours fp32": candidate(lambda: fp32.encode(texts)),
        "ours bf16": candidate(lambda: bf16.encode(texts)),
    }
    candidates["our tokenizer alone"] = Candidate(lambda: tokenizer.encode(texts))
    case = f"{name}, {int(lengths.sum()):,} tokens"
    yield from harness.case("encode", case, candidates, device, ceilings, baselines=baselines, product="bf16")


def ways(device: torch.device) -> dict[str, dict[str, Any]]:
    """The ways to run sentence-transformers here, and the keyword arguments of its model."""
    found: dict[str, dict[str, Any]] = {"fp32": {"dtype": torch.float32}, "bf16": {"dtype": torch.bfloat16}}
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        found[f"bf16 {UNPADDED}"] = {"dtype": torch.bfloat16, "attn_implementation": "flash_attention_2"}
    return found


def sentences(count: int, tokenizer: Tokenizer) -> tuple[list[str], str]:
    """Up to `count` distinct sentences of all tasks in random order, and a description of them."""
    folder = Path(os.environ.get("MINBERT_FAST_DATA", harness.ROOT.parent / "shared" / "data"))
    draw = random.Random(0)
    if folder.is_dir():
        paths = find_tables(folder, "dev").paths
        tables = [read_table(path, task) for task, path in paths.items()]
        texts = sorted({text for table in tables for column in table.sentences for text in column})
        draw.shuffle(texts)
        return texts[:count], "real sentences"
    histograms = json.loads((Path(__file__).parent / "lengths.json").read_text(encoding="utf-8"))
    words = [word for word in tokenizer.vocabulary.words if word.isalpha()]
    made = []
    for _ in range(count):
        histogram = draw.choice([h for h in histograms.values() if isinstance(h, list)])
        (length,) = draw.choices(range(len(histogram)), histogram)
        made.append(" ".join(draw.choices(words, k=max(1, length - 2))))
    return made, "made-up sentences of real lengths"


def best_batch_size(model: Any, texts: list[str], device: torch.device) -> int:
    timed = {str(size): partial(encode_with, model, texts, size) for size in BATCH_SIZES[device.type]}
    times = harness.measure(timed, device, repeats=3)
    return int(min(times, key=lambda size: min(times[size])))


def encode_with(model: Any, texts: list[str], batch_size: int) -> np.ndarray:
    vectors = model.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
    found: np.ndarray = vectors.float().cpu().numpy()
    return found


def check_cosines(vectors: np.ndarray, expected: np.ndarray) -> None:
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    least = float(((vectors * expected).sum(1) / lengths).min())
    assert least >= COSINE, f"a vector's cosine with sentence-transformers' fp32 is {least:.5f}"


def model_directory(shape: str, folder: Path) -> tuple[Path, str]:
    """A sentence-transformers directory of the shape, and a description of its weights."""
    real = os.environ.get("MINBERT_FAST_MINILM")
    if shape == "MiniLM-L6" and real:
        return Path(real), "real weights"
    config = CONFIGS[shape]
    directory = folder / shape
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)
    sentence_modules.write(directory, SentenceModules(directory, "mean", True, MAX_LENGTH), config.hidden_size)
    _tokenizer(config.vocab_size).save(directory)
    return directory, "random weights"


def _tokenizer(size: int) -> Tokenizer:
    """The tokenizer of the real weights, else that of the sample with made-up words added up to `size`."""
    real = os.environ.get("MINBERT_FAST_MINILM")
    if real:
        return Tokenizer.from_pretrained(real)
    vocabulary = Tokenizer.from_pretrained(sample_directory().model).vocabulary
    words = dict(vocabulary.words)
    for index in range(len(words), size):
        words[f"w{index}"] = index
    return Tokenizer(replace(vocabulary, words=words))
