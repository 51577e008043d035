"""`peel demo`: audit a small bundled checkpoint with a layer that got stuck early, and its healthy twin."""

from __future__ import annotations

from importlib.resources import as_file, files

from peelcli.cli.console import Console
from peelcli.cli.options import with_options
from peelcli.cli.reporting import check_format, judge_runs, show
from peelcli.cli.workspaces import workspace_for
from peelcli.config import Configs, ExtractConfig, FitConfig, ReportConfig
from peelcli.errors import PeelError

DEMOS = ("stuck", "healthy")


# A quick look: fewer tokens and kinds of reference than an audit, as the planted fault is plain.
EXTRACT = ExtractConfig(fit_tokens=8192, select_tokens=4096, eval_tokens=8192)
FIT = FitConfig(references=("identity", "direct"), direct_steps=24, ladder=False)


@with_options(ReportConfig)
def demo(configs: Configs, console: Console) -> int:
    """See one flagged audit and one clean one, in under a minute; needs no data, no network and no GPU."""
    check_format(configs[ReportConfig], console, to_file=False)
    console.hush_libraries()
    from peelcli.stages.audit import run_audit

    results = []
    for name in DEMOS:
        with as_file(files("peelcli") / "demo" / name) as checkpoint:
            workspace = workspace_for(checkpoint, None)
            done = console.drive(run_audit(checkpoint, EXTRACT, FIT, workspace))
        results += judge_runs([done.run], configs[ReportConfig])
    apart = configs[ReportConfig].format in ("table", "markdown")  # of any other format two are no document
    for shown in [[result] for result in results] if apart else [results]:
        show(shown, configs[ReportConfig], console, to_file=False)
    stuck, healthy = (bool(r.flagged) for r in results)
    if not stuck or healthy:
        raise PeelError(
            "the demo did not come out as planted: the stuck layer unflagged, or the healthy twin flagged"
        )
    console.note("`peel audit` ends with exit code 1 for the first of these, and with 0 for the second.")
    return 0
