# SPDX-License-Identifier: Apache-2.0
"""What the native layer ops refuse: nothing that reaches compiled code can make it read or write astray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert_fast.ops.native import layers
from tests.layers.cases import int32

ROWS, WIDTH, TASKS = 6, 8, 2


def arguments() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """Each op with arguments that it accepts."""
    rows, vector, statistic = torch.ones(ROWS, WIDTH), torch.ones(WIDTH), torch.ones(ROWS)
    bounds, index, table = int32(0, 2, ROWS), torch.zeros(ROWS, dtype=torch.int32), torch.ones(3, WIDTH)
    qkv, lse, seed = torch.ones(ROWS, 3, 2, 4), torch.ones(2, ROWS), torch.tensor([1])
    tables = {"word": table, "position": table.clone(), "type_": table.clone()}
    indices = {"tokens": index, "positions": index.clone(), "types": index.clone()}
    order = {"word_order": torch.arange(ROWS, dtype=torch.int32), "word_offsets": int32(0, 4, ROWS)}

    def out(*shape: int) -> Tensor:
        return torch.empty(TASKS, *shape)

    dropped = {"p": 0.5, "seed": seed}
    norm_out = {"dgamma": out(WIDTH), "dbeta": out(WIDTH)}
    norm = {"bias": vector, "residual": rows.clone(), "gamma": vector.clone()}
    saved = {"mean": statistic, "rstd": statistic.clone(), "bounds": bounds}
    packed = {"qkv": qkv, "cu_seqlens": bounds, "scale": 1.0, **dropped}
    dense = {"qkv": torch.ones(2, 3, 3, 2, 4), "mask": torch.ones(2, 3), "scale": 1.0, **dropped}
    return {
        "add_norm_forward": (layers.add_norm_forward, {
            "x": rows, **norm, "beta": vector.clone(), "eps": 1e-5, **dropped,
        }),
        "add_norm_backward": (layers.add_norm_backward, {
            "dy": rows.clone(), "x": rows, **norm, **saved, **dropped, **norm_out, "dbias": out(WIDTH),
        }),
        "bias_gelu_forward": (layers.bias_gelu_forward, {"x": rows, "bias": vector}),
        "bias_gelu_backward": (layers.bias_gelu_backward, {
            "dy": rows.clone(), "x": rows, "bias": vector, "bounds": bounds, "dbias": out(WIDTH),
        }),
        "column_sums": (layers.column_sums, {"x": rows, "bounds": bounds, "out": out(WIDTH)}),
        "embedding_forward": (layers.embedding_forward, {
            **indices, **tables, "gamma": vector, "beta": vector.clone(), "eps": 1e-5, **dropped,
        }),
        "embedding_backward": (layers.embedding_backward, {
            "dy": rows, **indices, **tables, "gamma": vector, **saved, **order, **dropped, **norm_out,
            "dword": out(2, WIDTH), "dposition": out(3, WIDTH), "dtype": out(3, WIDTH),
        }),
        "attention_forward": (layers.attention_forward, packed),
        "attention_backward": (layers.attention_backward, {"dout": rows, **packed, "lse": lse}),
        "attention_dense_forward": (layers.attention_dense_forward, dense),
        "attention_dense_backward": (layers.attention_dense_backward, {
            "dout": torch.ones(2, 3, 8), **dense, "lse": lse,
        }),
    }  # fmt: skip


NAMES = list(arguments())


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_of_these_tests_are_good(name: str) -> None:
    op, given = arguments()[name]
    op(**given)


SPOILERS: dict[str, Callable[[Tensor], Any]] = {
    "a longer first dimension": lambda t: t.new_ones(t.shape[0] + 1, *t.shape[1:]),
    "a shorter last dimension": lambda t: t.new_ones(*t.shape[:-1], t.shape[-1] - 1),
    "a further dimension": lambda t: t[None],
    "another dtype": lambda t: t.double() if t.is_floating_point() else t.float(),
    "half precision": lambda t: t.half(),
    "not a tensor": lambda t: t.tolist(),
    "another device": lambda t: t.to("meta"),
    "a sparse layout": lambda t: t.to_sparse(),
    "columns a stride apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


# What an op accepts by contract, or cannot know to be wrong: another size that nothing else contradicts.
HARMLESS = {
    *((name, argument, "a longer first dimension") for name, argument in (
        ("bias_gelu_forward", "x"), ("column_sums", "x"), ("attention_forward", "qkv"),
        ("embedding_forward", "word"), ("embedding_forward", "position"), ("embedding_forward", "type_"),
        ("embedding_backward", "word"),
    )),
    ("attention_forward", "qkv", "a shorter last dimension"),
    *((name, "mask", how) for name in ("attention_dense_forward", "attention_dense_backward") for how in (
        "another dtype", "half precision", "columns a stride apart",
    )),
    *((name, "seed", "columns a stride apart") for name in NAMES),  # one element has no stride
    ("attention_dense_forward", "qkv", "a shorter last dimension"),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_spoilt_argument_is_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    op, good = arguments()[name]
    argument = data.draw(st.sampled_from([n for n, value in good.items() if isinstance(value, Tensor)]))
    how = data.draw(st.sampled_from(sorted(SPOILERS)))
    if (name, argument, how) in HARMLESS:
        return
    with pytest.raises(ValueError):
        op(**good | {argument: SPOILERS[how](good[argument])})


@pytest.mark.parametrize("name", [n for n in NAMES if "p" in arguments()[n][1]])
@pytest.mark.parametrize("change", [{"p": 1.0}, {"p": -0.1}, {"p": float("nan")}, {"seed": None}, {"site": -1}])
def test_dropout_needs_a_probability_a_seed_and_a_site(name: str, change: dict[str, Any]) -> None:
    op, good = arguments()[name]
    with pytest.raises(ValueError, match=r"dropout|site"):
        op(**good | change)


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("column_sums", "bounds", int32(0, 4, 2), "bounds must not descend, but entry 2 does"),
        ("column_sums", "bounds", int32(1, 4, 6), "bounds must begin with 0"),
        ("column_sums", "bounds", int32(0, 4, 7), "bounds ends with 7, but there are 6 rows"),
        ("bias_gelu_backward", "bounds", int32(0, 2**31 - 1, 6), "bounds must not descend"),
        ("add_norm_backward", "bounds", int32(0, -1, 6), "bounds must not descend"),
        ("embedding_backward", "bounds", int32(0, 4, 7), "bounds ends with 7"),
        ("attention_forward", "cu_seqlens", int32(0, 4, 7), "cu_seqlens ends with 7, but there are 6 rows"),
        ("attention_backward", "cu_seqlens", int32(0, 4, 3, 6), "cu_seqlens must not descend"),
        ("embedding_forward", "tokens", int32(0, 0, 3, 0, 0, 0), r"tokens holds 3, which is not in \[0, 3\)"),
        ("embedding_backward", "positions", int32(0, 0, -1, 0, 0, 0), "positions holds -1"),
        ("embedding_backward", "types", int32(0, 0, 9, 0, 0, 0), "types holds 9"),
        ("embedding_backward", "word_order", int32(0, 1, 2, 3, 4, 6), "word_order holds 6"),
        ("embedding_backward", "word_offsets", int32(0, 4, 7), "word_offsets ends with 7"),
    ],
)
def test_indices_that_lead_out_of_a_tensor(name: str, argument: str, value: Tensor, message: str) -> None:
    op, good = arguments()[name]
    with pytest.raises(ValueError, match=message):
        op(**good | {argument: value})


def test_gradients_that_share_memory() -> None:
    op, good = arguments()["add_norm_backward"]
    J = torch.zeros(TASKS, 3 * WIDTH)
    apart = {"dgamma": J[:, :WIDTH], "dbeta": J[:, WIDTH : 2 * WIDTH], "dbias": J[:, 2 * WIDTH :]}
    op(**good | apart)
    with pytest.raises(ValueError, match="dgamma and dbeta must not share memory"):
        op(**good | apart | {"dbeta": J[:, WIDTH - 1 : 2 * WIDTH - 1]})
    with pytest.raises(ValueError, match="dbeta and dbias must not share memory"):
        op(**good | apart | {"dbias": apart["dbeta"]})
    with pytest.raises(ValueError, match="dbias must not share memory with an input"):
        op(**good | apart | {"dbias": good["x"][:TASKS]})
    with pytest.raises(ValueError, match="rows of dbias must not overlap"):
        op(**good | apart | {"dbias": torch.zeros(1, WIDTH).expand(TASKS, WIDTH)})


def test_widths_that_layer_norm_takes() -> None:
    for width in (0, layers.MAX_WIDTH + 1):
        x, vector = torch.zeros(1, width), torch.zeros(width)
        with pytest.raises(ValueError, match=f"hidden size must be 1 to 8192, not {width}"):
            layers.add_norm_forward(x, vector, x, vector, vector, 1e-5)
    x, vector = torch.randn(2, layers.MAX_WIDTH), torch.ones(layers.MAX_WIDTH)
    y, _, _ = layers.add_norm_forward(x, vector, x, vector, vector, 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x + x + 1, (layers.MAX_WIDTH,)) + 1)
