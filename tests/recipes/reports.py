# SPDX-License-Identifier: Apache-2.0
"""What five course reports trained and measured, typed from the reports row by row. Nothing here reads a recipe.

Sources (CS224N final reports on minBERT; course data, BERT-base): Sridhar and Yi, a Sentence-BERT extension (`sbert`);
Siamese minBERT (`siamese`); Lee, BERTology (`bertology`); Ma, Peng and Zhang, fine-tuning BERT (`finetune`); Stephens,
enhancing minBERT embeddings (`enhancing`). Where a report is silent, the starter's own values hold, the defaults of `Stage`
and `Row`: 10 epochs, batch 8, rate 1e-5 (frozen encoder: 1e-3) without warm-up, decay or clipping, head dropout 0.3, the
encoder's own dropout, pooler output.

A head reads in the order of its operations. "each" is an operation on each of a pair's two embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

TASKS = ("sentiment", "paraphrase", "similarity")
METRICS = {
    "sentiment": "sentiment_accuracy",
    "paraphrase": "paraphrase_accuracy",
    "similarity": "similarity_pearson",
    "cfimdb": "cfimdb_accuracy",
}


@dataclass(frozen=True)
class Stage:
    """One phase of training, in the order of the tasks within an epoch."""

    tasks: tuple[str, ...] = TASKS
    lr: float = 1e-5
    epochs: float = 10
    frozen: bool = False
    start: str | int = "last"  # of the phase before; "best": its best; N: after phase N
    decay: float = 1.0  # factor on the rate after each epoch


@dataclass(frozen=True)
class Row:
    """One row of a report's tables; scores in the order of its tasks, then the report's own total where it has one."""

    heads: dict[str, str]
    dev: tuple[float, ...]
    train: tuple[float, ...] = ()
    test: tuple[float, ...] = ()
    seconds: float | None = None
    stages: tuple[Stage, ...] = (Stage(),)
    batch: int = 8
    pooling: str = "pooler"
    own_pooling: dict[str, str] = field(default_factory=dict)  # tasks that pool otherwise
    scheme: str | None = None  # how an epoch mixes its tasks; None: there is one task
    surgery: str = "none"
    weight_decay: float = 0.0
    drawn: dict[str, tuple[float, bool, bool, float]] = field(default_factory=dict)  # fraction, balanced, replaced, dev

    @property
    def scored(self) -> tuple[str, ...]:
        """Tasks in the order of the scores."""
        return tuple(task for task in METRICS if task in self.heads)


ROWS: dict[str, Row] = {}


# ---- Sridhar and Yi ----------------------------------------------------------------------------------------------------

LINEAR = "dropout 0.3, linear"
ALONE = {task: Stage(tasks=(task,)) for task in ("sentiment", "paraphrase", "similarity", "cfimdb")}

for name, task, frozen, full in (("sst", "sentiment", 0.390, 0.523), ("cfimdb", "cfimdb", 0.780, 0.976)):
    still = replace(ALONE[task], lr=1e-3, frozen=True)
    ROWS[f"sbert-{name}-frozen"] = Row({task: LINEAR}, (frozen,), stages=(still,))
    ROWS[f"sbert-{name}-full"] = Row({task: LINEAR}, (full,), stages=(ALONE[task],))

ONE_DIMENSION = "each dropout 0.3, each linear to 1, cosine"
UNTRAINED = {
    "sentiment": LINEAR,
    "paraphrase": f"{ONE_DIMENSION}, BCE",
    "similarity": f"{ONE_DIMENSION}, MSE on [0, 1]",
}
ROWS["sbert-baseline-full"] = Row(UNTRAINED, (0.534, 0.392, 0.312), stages=(ALONE["sentiment"],), batch=64)
ROWS["sbert-baseline-frozen"] = replace(
    ROWS["sbert-baseline-full"],
    dev=(0.401, 0.376, 0.019),
    stages=(replace(ALONE["sentiment"], lr=1e-3, frozen=True),),
)

CONCATENATED = "each dropout 0.3, (u, v), linear, BCE"
PROJECTED = "each linear keeping the width, cosine, MSE on [-1, 1]"
ROWS["sbert-exp1"] = Row(
    {"sentiment": LINEAR, "paraphrase": CONCATENATED, "similarity": PROJECTED},
    dev=(0.490, 0.777, 0.592),
    train=(1.000, 0.990, 0.991),
    test=(0.508, 0.785, 0.569),
    stages=(Stage(epochs=15),),
    batch=32,
    scheme="cycle",
    surgery="pcgrad",
)
ROWS["sbert-exp2"] = replace(
    ROWS["sbert-exp1"], dev=(0.492, 0.772, 0.584), train=(1.000, 0.991, 0.988), test=(), surgery="none"
)
ROWS["sbert-exp3"] = replace(
    ROWS["sbert-exp1"],
    heads=ROWS["sbert-exp1"].heads | {"paraphrase": "each dropout 0.3, each linear keeping the width, cosine, BCE"},
    dev=(0.489, 0.443, 0.590),
    train=(0.998, 0.969, 0.990),
    test=(),
)
ROWS["sbert-exp4"] = replace(
    ROWS["sbert-exp1"],
    heads=ROWS["sbert-exp1"].heads | {"similarity": f"each dropout 0.3, {PROJECTED}"},
    dev=(0.490, 0.770, 0.460),
    train=(1.000, 0.988, 0.976),
    test=(),
)


# ---- Siamese minBERT ---------------------------------------------------------------------------------------------------

HALF = "dropout 0.5, linear"
QUARTER = {"paraphrase": (0.25, True, True, 0.5)}
DIFFERENCE = "each dropout 0.5, (u, v, |u-v|), linear, softmax"
ROWS["siamese"] = Row(
    {"sentiment": HALF, "paraphrase": DIFFERENCE, "similarity": "cosine, MSE on [0, 1]"},
    dev=(0.525, 0.591, 0.443),
    train=(0.866, 0.629, 0.860),
    stages=(Stage(epochs=5),),
    pooling="mean",
    scheme="sequential",
    drawn=QUARTER,
)
PRODUCT = "each dropout 0.5, (u*v), linear, softmax"
ROWS["siamese-baseline"] = replace(
    ROWS["siamese"],
    heads={"sentiment": HALF, "paraphrase": PRODUCT, "similarity": PRODUCT},
    dev=(0.52, 0.378, 0.089),
    train=(0.627, 0.461, 0.124),
    stages=(Stage(epochs=3),),
)
for name, head, dev, train in (
    ("product", PRODUCT, 0.43, 0.52),
    ("u-v-product", "each dropout 0.5, (u, v, u*v), linear, softmax", 0.58, 0.66),
    ("u-v-abs-diff", DIFFERENCE, 0.63, 0.71),
):
    alone = replace(ALONE["paraphrase"], epochs=5)
    ROWS[f"siamese-paraphrase-{name}"] = Row(
        {"paraphrase": head}, (dev,), (train,), stages=(alone,), pooling="mean", drawn=QUARTER
    )
for name, head, dev, train in (
    ("mse", "cosine, MSE on [0, 1]", 0.62, 0.78),
    ("l1", "cosine, L1 on [0, 1]", 0.57, 0.66),
    ("cross-entropy", DIFFERENCE, 0.24, 0.3),
):
    ROWS[f"siamese-similarity-{name}"] = Row(
        {"similarity": head}, (dev,), (train,), stages=(ALONE["similarity"],), pooling="mean"
    )


# ---- Lee ---------------------------------------------------------------------------------------------------------------

TENTH = "dropout 0.1, linear"
WHOLE = Stage(lr=2e-5, start="best")
PAIRS = replace(WHOLE, tasks=("paraphrase", "similarity"))
NLI = replace(WHOLE, tasks=("nli",), epochs=1)
ROWS["bertology-baseline"] = Row(
    {
        "sentiment": TENTH,
        "paraphrase": "(u, v), dropout 0.1, linear, BCE",
        "similarity": "(u, v), dropout 0.1, linear, MSE on raw labels",
    },
    dev=(0.479, 0.634, 0.347, 0.596),
    stages=(WHOLE,),
    batch=32,
    scheme="sequential",
)
SHARED = "shared 2 layers with dropout 0.1, (u, v), linear"
ROWS["bertology-shared"] = replace(
    ROWS["bertology-baseline"],
    heads={"sentiment": TENTH, "paraphrase": f"{SHARED}, BCE", "similarity": f"{SHARED}, MSE on raw labels"},
    dev=(0.513, 0.772, 0.328, 0.650),
)
MOD = {
    "sentiment": TENTH,
    "paraphrase": "(u, v, |u-v|), dropout 0.1, linear, BCE",
    "similarity": "cosine, MSE on [0, 1]",
}
ROWS["bertology-head-mod"] = replace(ROWS["bertology-baseline"], heads=MOD, dev=(0.480, 0.752, 0.721, 0.697))
ROWS["bertology-head-mod-1"] = replace(
    ROWS["bertology-baseline"],
    heads=MOD | {"paraphrase": "(u, v, cos), dropout 0.1, linear, BCE"},
    dev=(0.482, 0.748, 0.726, 0.698),
)
ROWS["bertology-freeze-sst"] = replace(
    ROWS["bertology-baseline"],
    heads=MOD | {"sentiment": f"4 BERT layers, {TENTH}"},
    dev=(0.420, 0.775, 0.758, 0.691),
    stages=(PAIRS, replace(WHOLE, tasks=("sentiment",), frozen=True)),
    own_pooling={"sentiment": "cls"},
)
# The report does not say how the head of SST_TO_STS was trained.
ROWS["bertology-sst-to-sts"] = replace(
    ROWS["bertology-baseline"],
    heads=MOD | {"sentiment": "cosines to 100 sentences a class and their labels, linear"},
    dev=(0.358, 0.775, 0.758, 0.671),
    stages=(PAIRS, Stage(tasks=("sentiment",), lr=1e-2, epochs=40, frozen=True, start="best", decay=0.0)),
)
GRADED = "cosine, MSE on [0, 1]"
ROWS["bertology-nli-regression"] = replace(
    ROWS["bertology-baseline"],
    heads={**MOD, "snli": GRADED, "mnli": GRADED},
    dev=(0.501, 0.823, 0.850, 0.750),
    stages=(replace(NLI, tasks=("snli",)), replace(NLI, tasks=("mnli",)), WHOLE),
)
NLI_LABELS = {"contradiction": 0.0, "neutral": 0.5, "entailment": 1.0}
for name, head, dev, test in (
    ("contrastive", "contrastive, temperature 1", (0.490, 0.790, 0.802, 0.727), ()),
    ("triplet", "triplet, euclidean, margin 1", (0.532, 0.881, 0.880, 0.784), (0.525, 0.876, 0.862, 0.777)),
):
    ROWS[f"bertology-nli-{name}"] = replace(
        ROWS["bertology-baseline"], heads={**MOD, "nli": head}, dev=dev, test=test, stages=(NLI, WHOLE)
    )


# ---- Ma, Peng and Zhang ------------------------------------------------------------------------------------------------

ONCE = Stage(epochs=1)
FIRST = (replace(ONCE, tasks=("similarity",)), ONCE)
ROWS["finetune-baseline"] = Row(
    {"sentiment": LINEAR, "paraphrase": CONCATENATED, "similarity": CONCATENATED.replace("BCE", "MSE on [0, 1]")},
    dev=(0.201, 0.682, 0.244),
    train=(0.993, 0.743, 0.904),
    test=(0.504, 0.771, 0.344),
    seconds=23 * 60 + 47,
    stages=(ONCE,),
    scheme="cycle",
    weight_decay=1e-4,
)
COSINE = ROWS["finetune-baseline"].heads | {"similarity": "cosine, MSE on [0, 1]"}
ROWS["finetune-cosine"] = replace(
    ROWS["finetune-baseline"],
    heads=COSINE,
    dev=(0.209, 0.736, 0.384),
    train=(0.991, 0.689, 0.833),
    test=(0.515, 0.686, 0.363),
    seconds=29 * 60 + 42,
)
ROWS["finetune-pcgrad"] = replace(
    ROWS["finetune-baseline"],
    surgery="pcgrad",
    dev=(0.209, 0.738, 0.299),
    train=(0.989, 0.742, 0.882),
    test=(0.531, 0.734, 0.329),
    seconds=45 * 60,
)
ROWS["finetune-similarity-first"] = replace(
    ROWS["finetune-baseline"],
    stages=FIRST,
    dev=(0.220, 0.701, 0.264),
    train=(0.994, 0.710, 0.782),
    test=(0.512, 0.703, 0.296),
    seconds=24 * 60 + 21,
)
ROWS["finetune-all"] = replace(
    ROWS["finetune-baseline"],
    heads=COSINE,
    surgery="pcgrad",
    stages=FIRST,
    dev=(0.227, 0.731, 0.351),
    train=(0.994, 0.739, 0.897),
    test=(0.528, 0.730, 0.394),
    seconds=45 * 60 + 2,
)


# ---- Stephens ----------------------------------------------------------------------------------------------------------

ROWS["enhancing-base"] = Row(
    {"sentiment": LINEAR, "paraphrase": "cosine, BCE", "similarity": "cosine, MSE on [0, 1]"},
    dev=(0.385, 0.375, 0.280),
    stages=(replace(ALONE["sentiment"], lr=1e-3, frozen=True),),
    own_pooling={"sentiment": "cls"},
)
DECAYED = {task: replace(stage, lr=1e-3, decay=0.96) for task, stage in ALONE.items()}
ROWS["enhancing-final"] = Row(
    {
        "sentiment": LINEAR,
        "paraphrase": "cosine, BCE",
        "similarity": "cosine embedding, margin 0",
        "mlm": "15 % of sentiment, paraphrase, similarity",
    },
    dev=(0.520, 0.583, 0.528),
    stages=(
        Stage(tasks=("mlm",), lr=4e-4, epochs=1, decay=0.96),
        DECAYED["sentiment"],
        replace(DECAYED["paraphrase"], start=1),
        replace(DECAYED["similarity"], start=1),
    ),
    own_pooling={"sentiment": "cls"},
)
