"""What is planted: base models in splits with other seeds, widths and layers, and the faults of each.

Thresholds are set on `tune`. `test` is for the figures, but what the rules look at was improved after it had been seen.
`fresh` is drawn anew, with seeds, widths and depths that nobody has looked at, whenever a rule has changed since.
`bitnet` is of another kind of network, which no rule was made for: weights and activations in few bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from decoders import Recipe

STEPS, EARLY = 500, (50, 150, 300)  # 10%, 30%, 60% of the training
VOCABULARY, TRAIN_TOKENS = 384, 300_000
SPLITS = ("tune", "test", "fresh", "bitnet")


@dataclass(frozen=True)
class Base:
    """A recipe, its twin of another seed, and a text that neither ever saw."""

    name: str
    split: str
    recipe: Recipe
    foreign: str

    @property
    def other_seed(self) -> Recipe:
        """The same run from another seed."""
        return replace(self.recipe, seed=self.recipe.seed + 100)


@dataclass(frozen=True)
class Case:
    """One checkpoint of the suite. layers: those that were hurt (from 1), of which `part`; () for a control."""

    base: str
    kind: str
    layers: tuple[int, ...] = ()
    part: str = "block"
    severity: float = 0.0
    foreign: bool = False  # audited on text that it never saw

    @property
    def name(self) -> str:
        """Unique, and fit for a file."""
        where = "+".join(map(str, self.layers)) or "none"
        text = "-foreign" if self.foreign else ""
        return f"{self.base}-{self.kind}-{where}-{self.part}-{self.severity:g}{text}"

    @property
    def group(self) -> str:
        """The fault as the table calls it."""
        return self.kind if self.part == "block" else f"{self.kind}, one sublayer"


def _base(name: str, split: str, foreign: str = "wikitext2_valid.txt", **recipe: object) -> Base:
    common = {
        "steps": STEPS,
        "saved_steps": (*EARLY, STEPS),
        "batch_size": 8,
        "train_tokens": TRAIN_TOKENS,
        "tokenizer": VOCABULARY,
    }
    return Base(name, split, Recipe(**{**common, **recipe}), foreign)  # type: ignore[arg-type]


# With GPT-2's own spread, 0.02, all layers but the first are hardly used after so few steps.
_GPT2 = {"family": "gpt2", "initial_spread": 0.1, "learning_rate": 2e-3}
# With the spread and rate of the Llamas it has learnt little after so few steps.
_BITNET = {"family": "bitnet", "precision": "bitnet", "initial_spread": 0.05, "learning_rate": 5e-3}
BASES = {
    base.name: base
    for base in (
        _base("llama4", "tune", d_model=64, num_layers=4, seed=0),
        _base("gpt5", "tune", **_GPT2, d_model=80, num_layers=5, seed=1),
        _base("llama6t", "tune", precision="ternary", d_model=64, num_layers=6, seed=2),
        _base("llama5", "test", d_model=80, num_layers=5, seed=10),
        _base("gpt6", "test", **_GPT2, d_model=64, num_layers=6, seed=11),
        _base("llama4b", "test", precision="binary", d_model=96, num_layers=4, seed=12),
        _base("llama6", "fresh", d_model=80, num_layers=6, seed=40),
        _base("gpt5b", "fresh", **_GPT2, d_model=96, num_layers=5, seed=41),
        _base("llama4t", "fresh", precision="ternary", d_model=96, num_layers=4, seed=42),
        _base("llama4n", "bitnet", precision="bitnet", d_model=96, num_layers=4, seed=60),
        _base("bitnet5", "bitnet", **_BITNET, d_model=96, num_layers=5, seed=61),
    )
}
# Faults in training: (kind, part, severity) by base; "stopped" at a share of the steps (0: frozen), "slow" by a factor.
IN_TRAINING: dict[str, tuple[tuple[str, str, float], ...]] = {
    "llama4": (
        ("stopped", "block", 0.0),
        ("stopped", "block", 0.3),
        ("slow", "block", 0.1),
        ("stopped", "attention", 0.1),
        ("slow", "mlp", 0.03),
    ),
    "gpt5": (
        ("stopped", "block", 0.1),
        ("stopped", "block", 0.6),
        ("slow", "block", 0.03),
        ("stopped", "mlp", 0.0),
    ),
    "llama6t": (("stopped", "block", 0.1), ("slow", "block", 0.3), ("stopped", "attention", 0.0)),
    "llama5": (
        ("stopped", "block", 0.1),
        ("stopped", "block", 0.6),
        ("slow", "block", 0.03),
        ("stopped", "mlp", 0.1),
        ("slow", "attention", 0.03),
    ),
    "gpt6": (
        ("stopped", "block", 0.0),
        ("stopped", "block", 0.3),
        ("slow", "block", 0.1),
        ("stopped", "attention", 0.0),
    ),
    "llama4b": (("stopped", "block", 0.1), ("slow", "block", 0.3), ("stopped", "mlp", 0.0)),
    "llama6": (
        ("stopped", "block", 0.0),
        ("stopped", "block", 0.3),
        ("slow", "block", 0.03),
        ("stopped", "attention", 0.1),
        ("slow", "mlp", 0.1),
    ),
    "gpt5b": (
        ("stopped", "block", 0.1),
        ("stopped", "block", 0.6),
        ("slow", "block", 0.1),
        ("stopped", "mlp", 0.1),
    ),
    "llama4t": (("stopped", "block", 0.3), ("slow", "block", 0.1), ("stopped", "attention", 0.1)),
    "llama4n": (("stopped", "block", 0.1), ("slow", "block", 0.1), ("stopped", "attention", 0.0)),
    "bitnet5": (("stopped", "block", 0.3), ("slow", "block", 0.3), ("stopped", "mlp", 0.1)),
}
AFTERWARDS: tuple[tuple[str, str, float], ...] = (
    ("new weights", "block", 0.0),
    ("new weights", "attention", 0.0),
    ("new weights", "mlp", 0.0),
    ("older", "block", 0.1),
    ("older", "block", 0.3),
    ("other seed", "block", 0.0),
    ("other seed", "attention", 0.0),
    ("other seed", "mlp", 0.0),
    ("exchanged", "block", 0.0),
    ("noise", "block", 0.3),
    ("noise", "attention", 1.0),
    ("noise", "mlp", 0.7),
    ("heads shuffled", "attention", 0.0),
)
ROTARY_ONLY = (("rotary lost", "attention", 0.0),)
LOW_BIT_ONLY = (("scales off", "block", 2.0),)
TERNARY_ONLY = (("fewer bits", "block", 1.0),)


def cases_of(base: Base) -> list[Case]:
    """Controls first. The layer that is hurt goes round, and never is the same for two severities in a row."""
    depth = base.recipe.num_layers
    found = [Case(base.name, "healthy"), Case(base.name, "healthy", severity=1.0)]  # 1: the other seed
    found += [Case(base.name, "early", severity=step / STEPS) for step in EARLY[1:]]
    found.append(Case(base.name, "healthy", foreign=True))
    after = list(AFTERWARDS)
    after += ROTARY_ONLY if base.recipe.family != "gpt2" else ()
    after += LOW_BIT_ONLY if base.recipe.precision != "fp" else ()
    after += TERNARY_ONLY if base.recipe.precision in ("ternary", "bitnet") else ()
    for number, (kind, part, severity) in enumerate((*IN_TRAINING.get(base.name, ()), *after)):
        layer = 1 + (number + base.recipe.seed) % depth
        layers = (layer, layer % depth + 1) if kind == "exchanged" else (layer,)
        found.append(Case(base.name, kind, layers, part, severity))
    return found
