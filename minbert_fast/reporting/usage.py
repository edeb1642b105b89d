# SPDX-License-Identifier: Apache-2.0
"""How an exported model is used, as code for its card. tests/commands/test_export.py runs this code."""

from __future__ import annotations

from minbert_fast.tasks.inference.predictor import Predictor

_ENCODERS = {
    "huggingface": """from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
embeddings = model.encode(["A sentence.", "Another one."])
""",
}
_OWN = """from minbert_fast import Predictor

model = Predictor.from_pretrained("{name}")
embeddings = model.encode(["A sentence.", "Another one."])
"""
_CALLS = {"sentiment": '(["A sentence."])', "paraphrase": '([("One?", "Two?")])', "similarity": '([("One.", "Two.")])'}
_CLASSIFIER = """from transformers import pipeline

classifier = pipeline("text-classification", model="{name}")
classifier({example}, top_k=None, truncation=True)
"""
_ONNX = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{name}/tokenizer.json")
tokenizer.enable_truncation({max_length})
tokenizer.enable_padding(pad_id={pad_id}, pad_token={pad_token!r})
session = onnxruntime.InferenceSession("{name}/model.onnx")

{examples}
encoded = tokenizer.encode_batch({batch})
feed = {{
    "input_ids": np.array([each.ids for each in encoded]),
    "attention_mask": np.array([each.attention_mask for each in encoded]),
    "token_type_ids": np.array([each.type_ids for each in encoded]),
}}
{results} = session.run([{outputs}], feed)
"""
_ONNX_OWN = """from minbert_fast.tasks.exporting.onnx_model import OnnxModel

model = OnnxModel.from_pretrained("{name}")
{call}
"""
_EXAMPLES = (
    ("firsts", '["One.", "A sentence."]'),
    ("seconds", '["Two.", "Another one."]'),
    ("thirds", '["Three.", "No."]'),
)


def usage(model: Predictor, name: str, form: str, task: str | None) -> list[str]:
    """Blocks of Python that use the model exported as `name` in the format `form`: `task`'s head, else the encoder."""
    if form == "onnx":
        return _onnx(model, name, task)
    if task is not None:
        pair = model.tasks[task].encoder == "cross"
        example = '{"text": "One?", "text_pair": "Two?"}' if pair else '"A sentence."'
        return [_CLASSIFIER.format(name=name, example=example)]
    tasks = {} if model.heads is None else model.tasks
    named = dict.fromkeys(found.preset for found in tasks.values() if found.preset in _CALLS)
    calls = "".join(f"model.{preset}{_CALLS[preset]}\n" for preset in named)
    single = [each for each, found in tasks.items() if found.preset not in _CALLS and found.num_texts == 1]
    calls += "".join(f'model.predict("{each}", ["A text."])\n' for each in single)
    return [_ENCODERS[form].format(name=name), _OWN.format(name=name) + calls]


def _onnx(model: Predictor, name: str, task: str | None) -> list[str]:
    found = None if task is None else model.tasks[task]
    encoder, count = ("bi", 1) if found is None else (found.encoder, found.num_texts)
    examples = [*_EXAMPLES, *((f"texts_{n}", f'["Text {n}.", "Another {n}."]') for n in range(4, count + 1))]
    names, texts = (list(column) for column in zip(*examples[:count], strict=True))
    if count == 1:
        names = ["sentences"]
    separate, joint = [f"*{column}" for column in names], [f"*zip({', '.join(names)})"]
    batch = {"bi": separate, "cross": joint, "both": separate + joint}[encoder]
    if found is None:
        outputs, results, method = ["sentence_embedding"], ["embeddings"], "embeddings = model.encode"
        if model.prompt:
            batch = [f"*({model.prompt!r} + sentence for sentence in sentences)"]
    else:
        results = outputs = ["prediction", "probabilities"] if found.class_names else ["prediction"]
        method = "model.predict"
    tokenizer = model.tokenizer
    code = _ONNX.format(
        name=name,
        max_length=model.max_length,
        pad_id=tokenizer.pad_id,
        pad_token=tokenizer.vocabulary.special["pad"],
        examples="\n".join(map(" = ".join, zip(names, texts, strict=True))),
        batch=f"[{', '.join(batch)}]",
        results=", ".join(results) + ("," if len(results) == 1 else ""),
        outputs=", ".join(f'"{output}"' for output in outputs),
    )
    return [code, _ONNX_OWN.format(name=name, call=f"{method}({', '.join(texts)})")]
