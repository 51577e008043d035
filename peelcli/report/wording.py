"""What the report says in words: sentences from records, without layout and without colour.

`surpassed` is a proof that the weights could be better; `matched` is not, and no sentence may blur the two.
"""

from __future__ import annotations

from collections.abc import Sequence

from peelcli.records import AuditResult, Finding, LayerVerdict, Reference
from peelcli.report.few_bits import few_bits_sentence
from peelcli.report.plain import base_name, fixed, layers_named
from peelcli.report.sentences import network_notes
from peelcli.report.zones import zone_sentence

NO_MORE = "this proves nothing beyond the suite"
MEANINGS = {
    "broken": "the weights or states cannot be right: not finite, or a copy of another layer's or step's",
    "surpassed": "proof that these weights can be improved on: with the reference in their place, the loss "
    "is lower on text that neither fitted nor chose it",
    "matched": "a reference of fewer bits does as well: the layer's capacity goes unused; this may be "
    "harmless and does not show that the loss could be lower",
    "undecided": "these measurements do not settle it",
    "effective": "every reference costs clearly more than the margin: no reference in the suite does better; "
    f"{NO_MORE}",
}
CHALLENGED = (
    "proof that these weights can be improved on: trained on alone, with the rest of the network held fixed, the "
    "layer does better, and by what it gains or by what else is known of it the fault is its own"
)
NETWORK_FLAGS = {
    "untrained": "on this text the network does no better than the token frequencies alone",
    "broken": "weights or losses are not finite",
    "damaged": "its blocks together do harm, and its loss is worse than that of token frequencies",
    "unconverged": "its own blocks under a refitted head do better by more than the text explains",
}
GAP = (
    "gap: CE as trained less CE with the reference in place, nats/token, with its interval (±: its wider side); "
    "above 0 the reference does better. !: flagged."
)
COLUMNS = (
    "bits: per weight, of the cheapest reference that does as well (- where none does). fvu: share of the "
    "layer's update that a fitted reference leaves unexplained. drop: cost of leaving the layer out, "
    "nats/token."
)
OWN = "own: bits per weight of the layer itself. score: orders the layers, higher is more under-optimised."
CHANGE = "change: of the gap since the run before, of the same reference where both measured it."


def headline(result: AuditResult) -> str:
    """The outcome in one sentence; claims no more than was measured."""
    network = f"the network is flagged ({', '.join(network_flags(result))})" if result.network_flagged else ""
    if result.flagged:
        count = f"{len(result.flagged)} of {len(result.layers)} audited layers flagged"
        return f"{count} ({layers_named(result.flagged)})" + (f", and {network}" if network else "")
    if network:
        return f"no single layer is flagged, but {network}"
    if not result.layers:
        return "no layer was audited: nothing is claimed"
    exceptions = [_layers_are(result, verdict) for verdict in MEANINGS if verdict != "effective"]
    if any(exceptions):
        return f"nothing is flagged under the policy, though {' and '.join(filter(None, exceptions))}"
    audited, total = len(result.layers), result.run.num_layers
    where = "" if audited == total else f", in the {audited} of {total} layers audited"
    return f"nothing is flagged: no reference in the suite does better{where}; {NO_MORE}"


def network_flags(result: AuditResult) -> list[str]:
    """What the network can be flagged for, its zone included."""
    zone = result.network.zone
    return [*result.network.flags, *([f"{zone} zone"] if zone in ("red", "yellow") else [])]


def _layers_are(result: AuditResult, verdict: str) -> str:
    layers = [found.layer for found in result.layers if found.verdict == verdict]
    return f"{layers_named(layers)} {'is' if len(layers) == 1 else 'are'} {verdict}" if layers else ""


def header(result: AuditResult) -> list[tuple[str, str]]:
    """What was audited, on what text, against what: a name and a sentence for each."""
    lines = (
        ("Checkpoint", checkpoint),
        ("Model", model),
        ("Data", data),
        ("Text", data_fit),
        ("Loss", loss),
        ("References", suite),
    )
    found = [(name, sentence(result)) for name, sentence in lines]
    in_bits = few_bits_sentence(result)
    if in_bits is not None:
        found.insert(2, ("Precision", in_bits))
    zone = zone_sentence(result)
    return found if zone is None else [*found, ("Zone", zone)]


def checkpoint(result: AuditResult) -> str:
    """Name, identity and step."""
    run = result.run
    step = "" if run.step is None else f", step {run.step}"
    return f"{base_name(run.checkpoint)}, id {run.checkpoint_id.rpartition(':')[2][:12]}{step}"


def model(result: AuditResult) -> str:
    """Family, depth, which layers were audited, and how they were run."""
    run = result.run
    audited = "all audited" if len(run.layers) == run.num_layers else f"audited: {layers_named(run.layers)}"
    device = f" on {run.device}" if run.device else ""
    family, dtype = run.family or "unknown family", run.dtype or "own dtype"
    return f"{family}, {run.num_layers} layers ({audited}), {dtype}{device}"


def data(result: AuditResult) -> str:
    """Which text, and how many tokens each part of it has."""
    run = result.run
    parts = ", ".join(f"{count} {part}" for part, count in run.tokens.items())
    return f"{run.data}; tokens: {parts}; sequences of {run.seq_len}"


def loss(result: AuditResult) -> str:
    """Cross-entropy and perplexity on `eval`, beside what no context at all achieves."""
    network, unigram = result.network, result.run.unigram_ce
    text = f"CE {fixed(network.ce)} nats/token, perplexity {fixed(network.perplexity, 2)}"
    return f"{text}; token frequencies alone: CE {fixed(unigram)}" if unigram else text


def data_fit(result: AuditResult) -> str:
    """How well the text suits the model."""
    network = result.network
    figures = ""
    if network.entropy is not None:
        entropy = f"entropy of the model's own predictions {fixed(network.entropy)} nats/token"
        figures = f" (CE {fixed(network.ce)}, {entropy})"
    if network.data_fit == "own":
        return f"suits the model{figures}"
    if network.data_fit == "foreign":
        return (
            f"foreign to the model{figures}: `surpassed` is hardly to be had on it; "
            "pass text like its training text with --data"
        )
    return f"not known whether it suits the model{figures}"


def suite(result: AuditResult) -> str:
    """The weights that references may use, and the seed."""
    run = result.run
    group = "" if run.group_size is None else f", groups of {run.group_size}"
    group = ", one step a matrix" if run.granularity == "tensor" else group
    zeros = "" if run.symmetric else " with zero points"
    return f"{run.scheme}{zeros}{group}; seed {run.seed}"


def reference(ref: Reference | None, *, brief: bool = False) -> str:
    """`direct mlp ternary`, `span 3-5 int4 g128`, `rescale mlp`, `exchange 2-3`, `rollback step 400`; `brief`: attn."""
    if ref is None:
        return "-"
    parts = [ref.kind]
    if ref.target != ref.layer:
        parts.append(f"{ref.layer}-{ref.target}")
    if ref.sublayer:
        parts.append(sublayer(ref.sublayer, brief=brief))
    if ref.scheme:
        parts.append(ref.scheme)
    if ref.group_size is not None:
        parts.append(f"g{ref.group_size}")
    if ref.origin_id is not None:
        parts.append(ref.origin_id if ref.origin_step is None else f"step {ref.origin_step}")
    return " ".join(parts)


def sublayer(name: str | None, *, brief: bool = False) -> str:
    """Which part is to blame; `-` where none is."""
    return "-" if name is None else "attn" if brief and name == "attention" else name


def meanings(layers: Sequence[LayerVerdict], *, by_layer: bool = True) -> list[tuple[str, str]]:
    """Each verdict that occurs in `layers`, with what it means and, where `by_layer`, for which layers."""
    found: dict[tuple[str, str], list[int]] = {}
    for verdict in sorted(layers, key=lambda v: list(MEANINGS).index(v.verdict)):
        challenged = verdict.verdict == "surpassed" and _by_challenge(verdict)
        meaning = CHALLENGED if challenged else MEANINGS[verdict.verdict]
        found.setdefault((verdict.verdict, meaning), []).append(verdict.layer)
    return [
        (verdict, f"{f' ({layers_named(numbers)})' if by_layer else ''}: {meaning}")
        for (verdict, meaning), numbers in found.items()
    ]


def _by_challenge(verdict: LayerVerdict) -> bool:
    return verdict.reference is not None and verdict.reference.is_challenge


def next_steps(layers: Sequence[LayerVerdict]) -> list[tuple[str, str, list[str]]]:
    """Verdict, heading and lines where a layer calls for words; layers with the same words share them."""
    said: dict[tuple[str, str, str, tuple[str, ...]], list[int]] = {}
    for verdict in layers:
        if verdict.verdict != "effective" or verdict.notes:
            words = (verdict.verdict, verdict.reason, verdict.advice, verdict.notes)
            said.setdefault(words, []).append(verdict.layer)
    worst_first = sorted(said.items(), key=lambda item: list(MEANINGS).index(item[0][0]))
    return [
        (name, f"{layers_named(numbers)}: {name}", [line for line in (reason, advice, *notes) if line])
        for (name, reason, advice, notes), numbers in worst_first
    ]


def network_lines(result: AuditResult) -> list[str]:
    """What is said about the network as a whole; its flags in words where no note puts them so."""
    flags = [f"{flag}: {NETWORK_FLAGS.get(flag, 'flagged')}" for flag in result.network.flags]
    return network_notes(result.network) or flags


def notes_on_files(result: AuditResult) -> list[Finding]:
    """The findings that no verdict carries already: what may have been misread, and what was left out."""
    return [f for f in result.run.findings if f.kind not in ("non-finite", "duplicate-layer")]


def finding(found: Finding) -> str:
    """One finding of the scan, with where it is."""
    layer = None if found.layer is None else f"layer {found.layer}"
    places = ", ".join(place for place in (layer, found.tensor) if place)
    return f"{found.kind}{' in ' + places if places else ''}: {found.message}"
