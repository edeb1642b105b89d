# SPDX-License-Identifier: Apache-2.0
"""The extension checks its arguments: none can make compiled code read or write outside a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert_fast.ops import native
from tests.ops.common import int32

ROWS, WIDTH, TASKS = 6, 8, 2


def arguments() -> dict[str, dict[str, Any]]:
    """Each function of the extension with arguments that it accepts, in its order."""
    rows, vector, statistic = torch.ones(ROWS, WIDTH), torch.ones(WIDTH), torch.ones(ROWS)
    bounds, index, table = int32(0, 2, ROWS), torch.zeros(ROWS, dtype=torch.int32), torch.ones(3, WIDTH)

    def out(*shape: int) -> Tensor:
        return torch.empty(TASKS, *shape)

    def again(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors)

    dropped = {"p": 0.5, "seed": torch.tensor([1]), "site": 3}
    norm = dict(zip(("bias", "residual", "gamma"), again(vector, rows, vector), strict=True))
    saved = {"mean": statistic, "rstd": statistic.clone(), "bounds": bounds}
    norm_out = {"dgamma": out(WIDTH), "dbeta": out(WIDTH)}
    forward_out = {"y": rows.clone(), "mean": statistic, "rstd": statistic.clone()}
    lookup = dict(zip(("tokens", "positions", "types"), again(index, index, index), strict=True))
    lookup |= dict(zip(("word", "position", "type_", "gamma"), again(table, table, table, vector), strict=True))
    words = {
        "cu_seqlens": bounds,
        "word_order": torch.arange(ROWS, dtype=torch.int32),
        "word_offsets": int32(0, 4, ROWS),
    }
    qkv, heads = torch.ones(ROWS, 3, 2, 4), torch.ones(2, ROWS)
    packed = {"cu_seqlens": bounds, "mask": None}
    dense = {"cu_seqlens": None, "mask": torch.ones(2, 3, dtype=torch.bool)}
    rest = {"max_seqlen": 4, "scale": 1.0, **dropped}
    return {
        "add_norm_forward": {"x": rows, **norm, "beta": vector, "eps": 1e-5, **dropped, **forward_out},
        "add_norm_backward": {
            "dy": rows.clone(), "x": rows, **norm, **saved, **dropped, **norm_out, "dbias": out(WIDTH),
            "dx": rows.clone(), "dresidual": rows.clone(),
        },
        "bias_gelu_forward": {"x": rows, "bias": vector, "y": rows.clone()},
        "bias_gelu_backward": {
            "dy": rows.clone(), "x": rows, "bias": vector, "bounds": bounds, "dbias": out(WIDTH), "dx": rows.clone(),
        },
        "column_sums": {"x": rows, "bounds": bounds, "out": out(WIDTH)},
        "embedding_forward": {**lookup, "beta": vector, "eps": 1e-5, **dropped, **forward_out},
        "embedding_backward": {
            "dy": rows, **lookup, **saved, **words, **dropped, "dword": out(2, WIDTH), "dposition": out(3, WIDTH),
            "d_type_table": out(3, WIDTH), **norm_out,
        },
        **{f"attention_forward{kind}": {"qkv": qkv, **where, **rest, "out": rows.clone(), "lse": heads.clone()}
           for kind, where in (("", packed), (" dense", dense))},
        **{f"attention_backward{kind}": {
            "dout": rows, "qkv": qkv, "out": rows.clone(), "lse": heads, **where, **rest, "dqkv": qkv.clone(),
           } for kind, where in (("", packed), (" dense", dense))},
    }  # fmt: skip


def call(name: str, given: dict[str, Any]) -> None:
    native.call(name.removesuffix(" dense"), *given.values())


NAMES = list(arguments())
#: Arguments that only other kernels read.
UNREAD = {("embedding_backward", "cu_seqlens"), ("attention_backward", "out"), ("attention_backward dense", "out")}


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_of_these_tests_are_good(name: str) -> None:
    call(name, arguments()[name])


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


# Changes that an op cannot detect: no other argument contradicts the new size.
HARMLESS = {
    *((name, table, "a longer first dimension") for name in ("embedding_forward", "embedding_backward")
      for table in ("word", *(("position", "type_") if name == "embedding_forward" else ()))),
    ("column_sums", "x", "a longer first dimension"),
    *((name, "seed", "columns a stride apart") for name in NAMES),  # one element has no stride
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_one_spoilt_argument_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    good = arguments()[name]
    argument = data.draw(st.sampled_from([n for n, value in good.items() if isinstance(value, Tensor)]))
    how = data.draw(st.sampled_from(sorted(SPOILERS)))
    if (name, argument) in UNREAD or (name, argument, how) in HARMLESS:
        return
    with pytest.raises((ValueError, TypeError, RuntimeError, BufferError)):
        call(name, good | {argument: SPOILERS[how](good[argument])})


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("add_norm_forward", "x", torch.ones(6, 8).half(), "x must be float32 or bfloat16, not float16"),
        ("add_norm_forward", "residual", torch.ones(6, 7), r"residual must have shape \[6, 8\], not \[6, 7\]"),
        (
            "add_norm_forward",
            "residual",
            torch.ones(8, 6).T,
            r"residual must be contiguous, but its strides are \[1, 6\]",
        ),
        ("add_norm_forward", "seed", None, "seed must be a tensor, not None"),
        ("add_norm_forward", "site", -1, r"site must be in \[0, 2\^31\), not -1"),
        ("column_sums", "bounds", int32(0, 4, 2), "bounds must not descend, but entry 2 does"),
        ("column_sums", "bounds", int32(1, 4, 6), "bounds must begin with 0"),
        ("column_sums", "bounds", int32(0, 4, 7), "bounds ends with 7, but there are 6 rows"),
        ("column_sums", "bounds", int32(), "bounds must hold at least one entry"),
        ("bias_gelu_backward", "bounds", int32(0, 2**31 - 1, 6), "bounds must not descend"),
        ("add_norm_backward", "bounds", int32(0, -1, 6), "bounds must not descend"),
        ("embedding_backward", "bounds", int32(0, 4, 7), "bounds ends with 7"),
        ("attention_forward", "cu_seqlens", int32(0, 4, 7), "cu_seqlens ends with 7, but there are 6 rows"),
        ("attention_backward", "cu_seqlens", int32(0, 4, 3, 6), "cu_seqlens must not descend"),
        ("attention_forward dense", "mask", torch.ones(2, 4, dtype=torch.bool), "mask must have one element a row"),
        ("embedding_forward", "tokens", int32(0, 0, 3, 0, 0, 0), r"tokens holds 3, which is not in \[0, 3\)"),
        ("embedding_backward", "positions", int32(0, 0, -1, 0, 0, 0), "positions holds -1"),
        ("embedding_backward", "types", int32(0, 0, 9, 0, 0, 0), "types holds 9"),
        ("embedding_backward", "word_order", int32(0, 1, 2, 3, 4, 6), "word_order holds 6"),
        ("embedding_backward", "word_offsets", int32(0, 4, 7), "word_offsets ends with 7"),
    ],
)
def test_the_error_says_what_is_wrong(name: str, argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(name, arguments()[name] | {argument: value})


def test_gradients_that_share_memory() -> None:
    good = arguments()["add_norm_backward"]
    J = torch.zeros(TASKS, 3 * WIDTH)
    apart = {"dgamma": J[:, :WIDTH], "dbeta": J[:, WIDTH : 2 * WIDTH], "dbias": J[:, 2 * WIDTH :]}
    call("add_norm_backward", good | apart)
    call("add_norm_backward", good | apart | {"dgamma": apart["dbias"], "dbias": apart["dgamma"]})
    with pytest.raises(ValueError, match="dgamma and dbeta must not share memory"):
        call("add_norm_backward", good | apart | {"dbeta": J[:, WIDTH - 1 : 2 * WIDTH - 1]})
    with pytest.raises(ValueError, match="dbeta and dbias must not share memory"):
        call("add_norm_backward", good | apart | {"dbias": apart["dbeta"]})
    with pytest.raises(ValueError, match="dbias must not share memory with an input"):
        call("add_norm_backward", good | apart | {"dbias": good["x"][:TASKS]})
    with pytest.raises(ValueError, match="rows of dbias must not overlap"):
        call("add_norm_backward", good | apart | {"dbias": torch.zeros(1, WIDTH).expand(TASKS, WIDTH)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, width, bounds = 311, 40, int32(0, 100, 100, 260, 300)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, dy, vector, table = draw(rows, width), draw(rows, width), draw(width), draw(9, width)
    index = torch.randint(9, (rows,), generator=generator, dtype=torch.int32)
    order, drop = torch.argsort(index, stable=True).int(), (0.1, torch.tensor([5]), 2)
    offsets = torch.searchsorted(index[order.long()], torch.arange(10)).int()
    qkv, dout = draw(rows, 3, 3, 24), draw(rows, 72)
    lookup = (index, index, index, table, draw(9, width), draw(9, width), vector)

    def results() -> list[Tensor]:
        y, dx, dz, out, dqkv = (torch.empty_like(t) for t in (x, x, x, dout, qkv))
        mean, rstd, lse = torch.empty(rows), torch.empty(rows), torch.empty(3, rows)
        J = torch.empty(3, 4, width)
        tables = [torch.empty(4, 9, width) for _ in range(3)]
        found = []
        native.call("add_norm_forward", x, vector, dy, vector, vector, 1e-5, *drop, y, mean, rstd)
        native.call("add_norm_backward", dy, x, vector, y, vector, mean, rstd, bounds, *drop, *J, dx, dz)
        found += [y.clone(), dx.clone(), dz.clone(), J.clone()]
        native.call("bias_gelu_forward", x, vector, y)
        native.call("bias_gelu_backward", dy, x, vector, bounds, J[0], dx)
        native.call("column_sums", x, bounds, J[1])
        found += [y.clone(), dx.clone(), J[:2].clone()]
        native.call("embedding_forward", *lookup, vector, 1e-5, *drop, y, mean, rstd)
        native.call(
            "embedding_backward", dy, *lookup, mean, rstd, bounds, None, order, offsets, *drop, *tables, J[0], J[1]
        )
        where = (int32(0, 70, 73, 200, 200, rows), None, 127, 0.2, *drop)
        native.call("attention_forward", qkv, *where, out, lse)
        native.call("attention_backward", dout, qkv, out, lse, *where, dqkv)
        return [*found, y, *tables, J[:2].clone(), out, lse, dqkv]

    torch.set_num_threads(1)
    alone = results()
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        for one, many in zip(alone, results(), strict=True):
            assert torch.equal(one, many)
