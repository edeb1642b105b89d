# SPDX-License-Identifier: Apache-2.0
"""Generates the embedded demonstration: three small tasks from a grammar, and a tiny untrained BERT.

    python tools/make_sample.py [DIRECTORY]

The output is the same on every machine: all random choices come from raw bits of Philox. Each task can be learned, but
not from single words:

- sentiment: reviews; their grade follows from words of graded strength, intensifiers, negation and contrast;
- paraphrase: questions about an (intent, subject) pair; a paraphrase rewords the question, a negative example changes the
  intent or the subject;
- similarity: scenes of (who, does what, where, how); each differing part lowers the score by its weight, less if the two
  variants are closely related.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors.numpy import save

from minbert_fast.data.formats import FORMATS
from minbert_fast.data.sample import sample_directory
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.vocabulary import SPECIAL, Vocabulary

TRAIN_ROWS, DEV_ROWS = 2000, 300
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
POSITIONS = 128
WEIGHT_DEVIATION = 0.05  # at this width, BERT's 0.02 needs twice as many steps

Row = tuple[tuple[str, ...], str]  # sentences, label
Item = TypeVar("Item")


class RandomSource:
    """Random choices from raw bits, which are the same in every release of NumPy."""

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=[seed, 0])

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        return int(self._philox.random_raw()) % limit

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def other(self, items: Sequence[Item], than: Item) -> Item:
        """One of `items` except `than`."""
        return self.pick([item for item in items if item != than])

    def uniform(self, *shape: int) -> np.ndarray:
        """float32 values, uniformly distributed with mean 0 and standard deviation 1."""
        bits = self._philox.random_raw(int(np.prod(shape))) >> np.uint64(40)
        return ((bits.astype(np.float64) / (1 << 23) - 1) * 3**0.5).astype(np.float32).reshape(shape)


# ---------------------------------------------------------------------------------------------- sentiment

ASPECTS = (
    "plot", "story", "acting", "cast", "script", "dialogue", "music", "ending", "pacing", "camera work",
    "humor", "lead actor", "direction", "first half", "final scene", "villain",
)  # fmt: skip
ADJECTIVES = {
    2: ("superb", "brilliant", "wonderful", "stunning", "flawless", "unforgettable", "masterful", "magnificent"),
    1: ("good", "pleasant", "decent", "charming", "enjoyable", "solid", "likable", "neat"),
    0: ("familiar", "conventional", "quiet", "simple", "lengthy", "modest", "ordinary", "unusual"),
    -1: ("dull", "weak", "slow", "clumsy", "bland", "forgettable", "uneven", "thin"),
    -2: ("awful", "dreadful", "horrible", "unbearable", "disastrous", "pathetic", "atrocious", "insulting"),
}
STRONGER = ("very", "truly", "remarkably", "deeply")
WEAKER = ("somewhat", "mildly", "a bit", "rather")
VERDICTS = {
    2: ("I loved every minute of it", "do not miss this one", "it deserves every award", "I could watch it forever"),
    1: ("I had a nice time", "it is worth a look", "I would see it again", "it kept me smiling"),
    0: ("it runs for two hours", "it was filmed last year", "it opens on Friday", "I saw it with a friend"),
    -1: ("I lost interest halfway", "I expected more", "it is not worth the ticket", "I checked my watch twice"),
    -2: ("I hated every minute of it", "avoid it at all costs", "I walked out", "I want my money back"),
}


def generate_clause(random: RandomSource) -> tuple[str, int]:
    """A statement about a film, and its grade from -2 to 2."""
    grade = random.pick((-2, -1, 0, 1, 2))
    if random.below(4) == 0:
        return random.pick(VERDICTS[grade]), grade
    form = random.pick(("plain", "plain", "stronger", "weaker", "negated"))
    words = random.pick(ADJECTIVES[grade])
    if form == "stronger":
        words, grade = f"{random.pick(STRONGER)} {words}", 2 * sign(grade)
    elif form == "weaker":
        words, grade = f"{random.pick(WEAKER)} {words}", sign(grade)
    elif form == "negated":
        words, grade = f"{random.pick(('not', 'hardly', 'never'))} {words}", -sign(grade)
    return f"the {random.pick(ASPECTS)} is {words}", grade


def generate_review(random: RandomSource) -> Row:
    """A review and its grade from 0 to 4; after `but` the second statement counts twice."""
    text, grade = generate_clause(random)
    form = random.pick(("one", "and", "but", "although"))
    if form != "one":
        other, second = generate_clause(random)
        if form == "and":
            text, grade = f"{text} and {other}", round_half_away(grade + second, 2)
        elif form == "but":
            text, grade = f"{text} , but {other}", round_half_away(grade + 2 * second, 3)
        else:
            text, grade = f"although {text} , {other}", round_half_away(grade + 2 * second, 3)
    return ((f"{text[0].upper()}{text[1:]} .",), str(grade + 2))


def sign(value: int) -> int:
    return (value > 0) - (value < 0)


def round_half_away(value: int, divisor: int) -> int:
    """value / divisor, rounded to the nearest integer, halves away from 0."""
    return sign(value) * ((2 * abs(value) + divisor) // (2 * divisor))


# --------------------------------------------------------------------------------------------- paraphrase

SUBJECTS = (
    ("guitar", "the guitar"), ("piano", "the piano"), ("Spanish", "the Spanish language"),
    ("chess", "chess games"), ("cooking", "making meals"), ("swimming", "swimming strokes"),
    ("physics", "the laws of physics"), ("coding", "computer programming"), ("drawing", "pencil drawing"),
    ("yoga", "yoga poses"), ("baking bread", "bread baking"), ("public speaking", "giving speeches"),
    ("singing", "the art of singing"), ("photography", "taking photographs"), ("gardening", "growing plants"),
    ("skiing", "downhill skiing"), ("algebra", "solving equations"), ("knitting", "knitting wool"),
    ("driving", "driving a car"), ("statistics", "statistical methods"), ("pottery", "shaping clay"),
    ("sailing", "steering a boat"), ("juggling", "juggling balls"), ("calligraphy", "beautiful handwriting"),
)  # fmt: skip
INTENTS = (
    ("How can I learn {} quickly?", "What is the fastest way to master {}?", "How do I pick up {} in a short time?"),
    ("What does it cost to study {}?", "How expensive are lessons in {}?", "How much money do courses in {} take?"),
    ("Why is {} so hard?", "What makes {} difficult?", "For what reason do people struggle with {}?"),
    ("Which book about {} is best?", "What should I read on {}?", "Can you recommend a text about {}?"),
    ("Is {} good for children?", "Should kids try {}?", "At what age can a child begin with {}?"),
    ("Who invented {}?", "Where does {} come from?", "What is the origin of {}?"),
    ("Can I earn a living with {}?", "Are there jobs in {}?", "Does {} pay as a career?"),
    ("Is {} bad for my health?", "What injuries does {} cause?", "Can {} hurt my body?"),
)


def generate_questions(random: RandomSource) -> Row:
    """Two questions, and whether they have the same meaning."""
    intent, subject = random.pick(INTENTS), random.pick(SUBJECTS)
    wording, name = random.pick(intent), random.pick(subject)
    first = wording.format(name)
    if random.below(2):
        return (first, random.other(intent, wording).format(random.pick(subject))), "1.0"
    if random.below(2):
        subject = random.other(SUBJECTS, subject)
    else:
        intent = random.other(INTENTS, intent)
    return (first, random.pick(intent).format(random.pick(subject))), "0.0"


# --------------------------------------------------------------------------------------------- similarity

# The variants of each part of a scene, grouped into families of related variants; each variant has two wordings. Variants of
# a family share words and the two wordings mostly do not, so that counting common words does not give the score.
WHO = (
    (("A man", "A guy"), ("A woman", "A lady"), ("An old man", "A grandfather"), ("An old woman", "A grandmother")),
    (("A dog", "A hound"), ("A young dog", "A puppy"), ("A cat", "A pussycat"), ("A young cat", "A kitten")),
    (("A child", "A kid"), ("A girl", "A daughter"), ("A boy", "A son")),
    (("Two soldiers", "A pair of troopers"), ("Two nurses", "A pair of caregivers")),
)
DOES = (
    (("is running", "is sprinting"), ("is walking", "is strolling"), ("is jumping", "is leaping")),
    (("is sleeping", "is napping"), ("is resting", "is lying down"), ("is sitting", "is seated")),
    (("is eating bread", "chews on a loaf"), ("is eating soup", "spoons up broth")),
    (("is playing with a ball", "tosses a round toy"), ("is playing with a rope", "pulls a long cord")),
    (("is looking at a train", "watches railway cars"), ("is looking at birds", "watches sparrows")),
)
WHERE = (
    (("in the park", "on public grounds"), ("in the garden", "between flower beds"), ("in the grass", "on a lawn")),
    (("at the beach", "by an ocean"), ("at the river", "near a stream"), ("at the lake", "beside a pond")),
    (("in the kitchen", "next to an oven"), ("in the bedroom", "close to a bed")),
    (("on the street", "along a road"), ("on the platform", "inside a station")),
)
HOW = (
    (("in the morning", "at dawn"), ("in the evening", "at dusk"), ("in the night", "after dark")),
    (("in the rain", "during a shower"), ("in the snow", "amid white flakes")),
    (("all alone", "without company"), ("with friends", "among pals")),
)
PARTS = ((WHO, 14), (DOES, 18), (WHERE, 12), (HOW, 6))  # weights in tenths of the score
CLOSE = 0.4  # credit for two variants of the same family


def generate_scenes(random: RandomSource) -> Row:
    """Two scenes and their similarity from 0 to 5, in steps of 0.2."""
    first, second = [], []
    score = 0.0
    # The probability that a part stays the same varies from pair to pair, so that all scores are frequent.
    keep = random.pick((0, 2, 4, 6, 8, 9))
    for families, weight in PARTS:
        family = random.pick(families)
        variant = random.pick(family)
        first.append(random.pick(variant))
        worth = 1.0
        if random.below(10) >= keep:
            if random.below(3) == 0:
                variant, worth = random.other(family, variant), CLOSE
            else:
                variant, worth = random.pick(random.other(families, family)), 0.0
        # Mostly in the other wording, so that common words do not give the score.
        second.append(random.other(variant, first[-1]) if random.below(4) else random.pick(variant))
        score += worth * weight / 10
    sentences = tuple(agree(" ".join(parts)) + "." for parts in (first, second))
    return sentences, f"{round(score * 5) / 5:.1f}"


def agree(sentence: str) -> str:
    """Changes the verb to the plural if the subject is plural."""
    if not sentence.startswith(("Two ", "A pair ")):
        return sentence
    return re.sub(r"\b(chew|spoon|toss|pull|watch)e?s\b", r"\1", sentence.replace(" is ", " are ", 1))


# -------------------------------------------------------------------------------------------------- files

TASKS: dict[str, Callable[[RandomSource], Row]] = {
    "sentiment": generate_review,
    "paraphrase": generate_questions,
    "similarity": generate_scenes,
}


def generate_rows(task: str, seed: int) -> list[Row]:
    """Distinct rows of a task for both splits."""
    random = RandomSource(seed)
    rows: dict[tuple[str, ...], str] = {}
    while len(rows) < TRAIN_ROWS + DEV_ROWS:
        sentences, label = TASKS[task](random)
        if len(set(sentences)) == len(sentences):
            rows.setdefault(sentences, label)
    return list(rows.items())


def write_table(path: Path, task: str, rows: Sequence[Row]) -> None:
    """Writes rows in the course's layout."""
    layout = FORMATS[task]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=layout.separator, lineterminator="\n")
        writer.writerow(["", layout.id, *layout.texts, *layout.label])
        for index, (sentences, label) in enumerate(rows):
            name = hashlib.blake2b("\n".join(sentences).encode(), digest_size=6).hexdigest()
            writer.writerow([index, name, *sentences, label])


def build_vocabulary(texts: Sequence[str]) -> Vocabulary:
    """Letters, from which every word can be spelled, then the words of the texts by descending frequency."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    counts = Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    common = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = [*SPECIAL.values(), *".,?!;:'\"-()", *letters, *(f"##{letter}" for letter in letters), *common]
    return Vocabulary({piece: index for index, piece in enumerate(dict.fromkeys(pieces))})


def generate_weights(config: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Random weights of a BERT encoder with Hugging Face's parameter names."""
    random = RandomSource(seed)
    hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    shapes = {f"embeddings.{table}_embeddings": (config[size], hidden) for table, size in tables.items()}
    norms = ["embeddings.LayerNorm"]
    for base in (f"encoder.layer.{layer}" for layer in range(layers)):
        square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        shapes |= {f"{base}.{name}": (hidden, hidden) for name in square}
        shapes |= {f"{base}.intermediate.dense": (inner, hidden), f"{base}.output.dense": (hidden, inner)}
        norms += [f"{base}.attention.output.LayerNorm", f"{base}.output.LayerNorm"]
    shapes["pooler.dense"] = (hidden, hidden)
    tensors = {
        f"{name}.weight": random.uniform(*shape) * np.float32(WEIGHT_DEVIATION) for name, shape in shapes.items()
    }
    tensors |= {f"{name}.bias": np.zeros(shape[0], np.float32) for name, shape in shapes.items() if "_emb" not in name}
    tensors |= {f"{name}.weight": np.ones(hidden, np.float32) for name in norms}
    return tensors | {f"{name}.bias": np.zeros(hidden, np.float32) for name in norms}


def write_model(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Writes the tiny model and its tokenizer."""
    tokenizer = Tokenizer(build_vocabulary(texts), model_max_length=POSITIONS)
    tokenizer.save(folder)
    sizes = {**SHAPE, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": POSITIONS, "type_vocab_size": 2}
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        **sizes,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": WEIGHT_DEVIATION,
        "layer_norm_eps": 1e-12,
        "pad_token_id": tokenizer.pad_id,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    content = save(generate_weights(sizes, seed), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(content)


def make_sample(directory: Path, seed: int = 1) -> None:
    """Writes the complete demonstration into `directory`."""
    (directory / "model").mkdir(parents=True, exist_ok=True)
    texts = []
    for number, task in enumerate(TASKS):
        rows = generate_rows(task, seed + number)
        stem = FORMATS[task].stem
        write_table(directory / f"{stem}-train.csv", task, rows[:TRAIN_ROWS])
        write_table(directory / f"{stem}-dev.csv", task, rows[TRAIN_ROWS:])
        texts += [text for sentences, _ in rows for text in sentences]
    write_model(directory / "model", texts, seed + len(TASKS))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tools/make_sample.py", description=(__doc__ or "").split("\n")[0])
    target = sample_directory().data
    parser.add_argument("directory", nargs="?", type=Path, default=target, help="default: in the package")
    make_sample(parser.parse_args().directory)


if __name__ == "__main__":
    main()
