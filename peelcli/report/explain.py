"""Everything that is known about one layer, in words: what was tried and cost, why the verdict, what to try next."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

from peelcli.errors import UsageError
from peelcli.records import AuditResult, LayerVerdict
from peelcli.records.printable import harmless_json
from peelcli.report import changes, wording
from peelcli.report.cells import ruled_table, text, verdict_text
from peelcli.report.json_format import layer_object, plain_object, score_object
from peelcli.report.plain import base_name, fixed, gap_with_interval, layers_named, short, signed
from peelcli.report.remedies import peers_gap, remedies
from peelcli.report.table import heading, paragraphs, plain_console, without_trailing
from peelcli.report.zones import map_text

EXPLANATIONS = ("table", "json")
SCHEMA, SCHEMA_VERSION = "peel/explanation", 1
NARROW = 76  # columns; below this only what a reference costs
TRIED = (
    "gap: CE as trained less CE with the reference in place, nats/token; above 0 the reference does better. others: "
    "the same reference's median gap in the other layers."
)
FIELD_WORDS = {
    "identity": "layer ablation",
    "direct": "low-bit distillation",
    "span": "layer merge",
    "challenge": "single-layer fine-tune",
    "rescale": "per-head gains",
    "exchange": "layer swap",
    "rollback": "earlier block",
}
MORE = "KL: how far it changes the predictions. fvu: share of the layer's update that it leaves unexplained."


def render_explanation(
    results: Sequence[AuditResult], layer: int, format: str = "table", *, width: int = 80, color: bool = False
) -> str:
    """What is known about `layer` in the last of `results`, and how it went in those before; ends with a newline.

    Raises UsageError where the last run has no such layer, and for a format that is not in `EXPLANATIONS`.
    """
    result = results[-1]
    verdict = _found(result, layer)
    if format not in EXPLANATIONS:
        raise UsageError(f"--format {format!r}: expected one of {', '.join(EXPLANATIONS)}")
    if verdict is None:
        audited = layers_named(v.layer for v in result.layers) if result.layers else "none"
        raise UsageError(
            f"layer {layer}: not audited on {base_name(result.run.checkpoint)}, only {audited}; name one of them"
        )
    if format == "json":
        return _json(results, result, verdict)
    out = StringIO()
    console = plain_console(out, width, color)
    _explain(console, results, result, verdict)
    return without_trailing(out.getvalue())


def _found(result: AuditResult, layer: int) -> LayerVerdict | None:
    return next((verdict for verdict in result.layers if verdict.layer == layer), None)


def _explain(
    console: Console, results: Sequence[AuditResult], result: AuditResult, verdict: LayerVerdict
) -> None:
    flagged = ", flagged" if verdict.layer in result.flagged else ""
    name = f"Layer {verdict.layer} of {wording.checkpoint(result)}: "
    title = text(name, "bold")
    title.append_text(verdict_text(verdict.verdict)).append_text(text(flagged, "bold red"))
    console.print(title)
    console.print()
    meaning = "".join(words for _, words in wording.meanings([verdict], by_layer=False))
    paragraphs(console, [line for line in changes.words(result, verdict) if line != verdict.advice])
    paragraphs(console, [f"{verdict.verdict}{meaning}"], "dim")
    heading(console, "What is known")
    paragraphs(console, _known(result, verdict))
    wide = console.width >= NARROW
    tried = _tried(result, verdict.layer, wide=wide)
    heading(console, "What was tried")
    if tried is None:
        paragraphs(console, ["Nothing: no reference was measured on this layer."])
    else:
        console.print(tried)
        console.print()
        legend = [f"{TRIED} {MORE}" if wide else TRIED, _kinds(result, verdict.layer)]
        paragraphs(console, filter(None, legend), "dim")
    if len(results) > 1:
        heading(console, "How it went")
        console.print(_history(results, verdict.layer))
    heading(console, "What to try next")
    paragraphs(console, filter(None, [verdict.advice]))
    steps = Table.grid(padding=(0, 2, 0, 0))
    steps.add_column(no_wrap=True)
    steps.add_column(overflow="fold")
    for topic, sentence in remedies(result, verdict).items():
        steps.add_row(text(topic, "bold"), text(sentence))
    console.print(steps)


def _known(result: AuditResult, verdict: LayerVerdict) -> Iterator[str]:
    """The layer's figures beside those of the others, in sentences."""
    run = result.run
    if verdict.sublayer:
        yield f"To blame: {'the whole block' if verdict.sublayer == 'block' else f'its {verdict.sublayer}'}."
    if verdict.own_bits is not None:
        enough = short(verdict.effective_bits)
        suffice = "none of fewer does as well" if enough == "-" else f"{enough} suffice"
        yield f"Bits per weight: {short(verdict.own_bits)} of its own; {suffice}."
    ranked = sorted((v.score for v in result.layers if v.score is not None), reverse=True)
    if verdict.score is not None and math.isfinite(verdict.score):
        place = ranked.index(verdict.score) + 1
        score = signed(verdict.score)
        yield f"Of {len(ranked)} layers it is number {place} from the most under-optimised on (score {score})."
    if run.paths is not None and run.paths.scores:
        best = min(run.paths.scores, key=lambda s: sum(s.nll_select) / max(len(s.nll_select), 1))
        shares = best.unexplained
        if len(shares) >= verdict.layer:
            rest = [share for at, share in enumerate(shares, start=1) if at != verdict.layer]
            others = f", of the others {fixed(sum(rest) / len(rest))} in the mean" if rest else ""
            share = fixed(shares[verdict.layer - 1])
            yield f"On the best peeled path, {map_text(best.target_map)}, {share} of its target is left over{others}."
    tried = run.tried_on(verdict.layer)
    few = [s for s in tried if s.stride(len(run.nll_eval)) > 1]
    if few:
        yield (
            f"{len(few)} of the {len(tried)} references tried were measured on {len(few[0].nll_eval)} of the "
            f"{len(run.nll_eval)} sequences alone, which settles that they decide nothing."
        )
    same = [n for n, found in run.layer_hashes.items() if found == run.layer_hashes.get(str(verdict.layer))]
    if len(same) > 1:
        yield f"The same weights, byte for byte, stand in {layers_named(map(int, same))}."
    yield from (
        f"Scan of the files: {wording.finding(found)}"
        for found in run.findings
        if found.layer == verdict.layer
    )
    if result.network.data_fit == "foreign":
        yield f"The text is {wording.data_fit(result)}."


def _tried(result: AuditResult, layer: int, *, wide: bool) -> Table | None:
    scores = result.run.tried_on(layer)
    if not scores:
        return None
    table = ruled_table()
    table.add_column("reference", overflow="fold")
    for header in ("bits", "gap", "others", *(("KL", "fvu", "steps") if wide else ())):
        table.add_column(header, justify="right", no_wrap=True)
    if wide:
        table.add_column("fit", overflow="fold")
    for score in sorted(scores, key=lambda s: _order(result.gap_of(s.reference)), reverse=True):
        kl = sum(score.kl_eval) / len(score.kl_eval) if score.kl_eval else None
        fit = score.fit.reason if score.fit.converged else f"not converged: {score.fit.reason}"
        row = (
            wording.reference(score.reference, brief=True),
            short(score.reference.bits),
            signed(result.gap_of(score.reference)),
            signed(peers_gap(result, score.reference)),
            fixed(kl, 4),
            fixed(score.fit.fvu_eval),
            str(score.fit.steps),
            fit,
        )
        table.add_row(*map(text, row[: len(table.columns)]))
    return table


def _kinds(result: AuditResult, layer: int) -> str:
    """The kinds of references that were tried, each with the word that the field has for it."""
    kinds = {score.reference.kind for score in result.run.tried_on(layer)}
    return "; ".join(f"{kind}: {word}" for kind, word in FIELD_WORDS.items() if kind in kinds)


def _order(gap: float) -> float:
    return gap if math.isfinite(gap) else -math.inf


def _history(results: Sequence[AuditResult], layer: int) -> Table:
    table = ruled_table(gutter=2)
    table.add_column("run", overflow="fold")
    for header in ("verdict", "gap", "decided by"):
        table.add_column(header, overflow="fold")
    for result in results:
        verdict = _found(result, layer)
        name = base_name(result.run.checkpoint)
        if verdict is None:
            table.add_row(text(name), text("not audited"), text("-"), text("-"))
            continue
        mark = verdict_text(verdict.verdict).append_text(text(" !" if layer in result.flagged else ""))
        gap = gap_with_interval(verdict.gap, verdict.gap_interval)
        table.add_row(text(name), mark, text(gap), text(wording.reference(verdict.reference, brief=True)))
    return table


def _json(results: Sequence[AuditResult], result: AuditResult, verdict: LayerVerdict) -> str:
    scores = result.run.tried_on(verdict.layer)
    past = [(r, found) for r in results if (found := _found(r, verdict.layer)) is not None]
    report = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "checkpoint": result.run.checkpoint,
        "checkpoint_id": result.run.checkpoint_id,
        "step": result.run.step,
        "layer": layer_object(verdict, result),
        "known": list(_known(result, verdict)),
        "tried": [
            {**score_object(s, result.run.nll_eval), "others_gap": peers_gap(result, s.reference)}
            for s in scores
        ],
        "training": remedies(result, verdict),
        "history": [
            {"checkpoint": r.run.checkpoint, "step": r.run.step, "layer": layer_object(found, r)}
            for r, found in past
        ],
    }
    return harmless_json(json.dumps(plain_object(report, "explanation"), indent=2, allow_nan=False)) + "\n"
