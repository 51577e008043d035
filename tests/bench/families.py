"""Every causal language model that transformers can build, tiny and random: does peel run it as transformers does?

For each model type a checkpoint is built from its config, opened as peel opens it, run block by block, and compared
with a plain forward pass on the same ids. `--write` puts what was found into `peelcli/docs/families.md`.
"""

from __future__ import annotations

import argparse
import re
import resource
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from family_sizes import OVERRIDES, SIZES, SPECIAL, VARIANTS
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

from peelcli.checkpoint.files import open_checkpoint, require_decoder_only
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.checkpoint.single_pass import require_blockwise
from peelcli.errors import PeelError

DOCUMENT = Path(__file__).parents[2] / "peelcli" / "docs" / "families.md"
SEQ_LEN = 40
TOLERANCE = 1e-4  # nats a token
MOST_NBYTES, MOST_SECONDS = 12 * 2**30, 60


@dataclass(frozen=True)
class Found:
    """What peel made of one checkpoint. status: right, refused, wrong, crash or not built."""

    name: str
    model_type: str
    status: str
    detail: str = ""
    sublayers: str = ""

    def __str__(self) -> str:
        return f"{self.name:32} {self.status:10} {self.sublayers:14} {self.detail}"


def model_types() -> list[str]:
    """The types of which transformers has a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name → model type and settings, the variants of a type after its plain form."""
    encoders = {"is_decoder": True}  # what makes decoders of them, and means nothing to others
    plain = {
        kind: (kind, (encoders if kind in MASKED else {}) | OVERRIDES.get(kind, {})) for kind in model_types()
    }
    return plain | {name: (kind, OVERRIDES.get(kind, {}) | more) for name, (kind, more) in VARIANTS.items()}


def tiny_config(kind: str, settings: Mapping[str, Any]) -> Any:
    """A small config of the type: the sizes that it knows, and `settings` over them."""
    made = CONFIG_MAPPING[kind]
    return made(**{**_sizes(made), **settings})


def _sizes(made: Any) -> dict[str, Any]:
    """What SIZES has of the settings of a config class, those of its parts included."""
    try:
        fresh = made()
    except ValueError:  # its own defaults do not fit each other
        fresh = None
    known = {key: value for key, value in SIZES.items() if fresh is None or _states(fresh, key)}
    parts: dict[str, Any] = {}
    for name, part in getattr(made, "sub_configs", {}).items():
        inner = getattr(fresh, name, None)
        if inner is not None:
            kind = {"model_type": inner.model_type} if part is AutoConfig else {}
            parts[name] = _sizes(type(inner)) | kind
    return {**known, **SPECIAL, **parts}


def _states(config: Any, key: str) -> bool:
    value = vars(config).get(key)
    return value is not None and not isinstance(value, list)


def build(kind: str, settings: Mapping[str, Any], seed: int = 0) -> Any:
    """A random model of the type in eval mode, whose matrices are larger than at initialisation."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, settings)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name and "A_log" not in name:
                parameter.normal_(0, 0.15)
    return model.eval()


def ids_for(model: nn.Module, rows: int = 3, length: int = SEQ_LEN) -> Tensor:
    """Random ids (rows, length) that no family reads as special."""
    embedded: Any = model.get_input_embeddings()  # type: ignore[operator]
    top = min(120, embedded.weight.shape[0] if embedded is not None else 120)
    return torch.randint(5, top, (rows, length), generator=torch.Generator().manual_seed(1))


def loss(logits: Tensor, ids: Tensor) -> float:
    """Mean CE, nats per token."""
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))


@torch.no_grad()
def blockwise(model: BlockwiseModel, ids: Tensor) -> Tensor:
    """Logits as every stage of peel comes to them."""
    hidden = model.prepare(ids).hidden
    for layer in range(1, model.num_layers + 1):
        with model.block(layer) as module:
            hidden = model.run_block(layer, module, hidden, ids)
    return model.logits(hidden, ids)


def found(name: str, kind: str, settings: Mapping[str, Any], work: Path) -> Found:
    """Build, open, run and compare one checkpoint."""
    try:
        build(kind, settings).save_pretrained(work / "ckpt")
        plain = transformers.AutoModelForCausalLM.from_pretrained(work / "ckpt", dtype=torch.float32).eval()
        ids = ids_for(plain)
        with torch.no_grad():
            expected = plain(input_ids=ids, use_cache=False).logits
    except Exception as error:  # noqa: BLE001  a row of the table: this machine or this config cannot build it
        return Found(name, kind, "not built", _line(error))
    try:
        require_decoder_only(open_checkpoint(work / "ckpt").config)
        model = BlockwiseModel(work / "ckpt", dtype=torch.float32, device="cpu", offload_dir=work / "off")
        require_blockwise(model, ids[:2])
        ours = blockwise(model, ids)
    except PeelError as error:
        return Found(name, kind, "refused", _line(error).replace(f"{work / 'ckpt'}: ", ""))
    except Exception as error:  # noqa: BLE001  what a user would see as a mistake in peel
        return Found(name, kind, "crash", _line(error))
    apart = abs(loss(ours, ids) - loss(expected, ids))
    most = float((ours - expected).abs().max() / expected.abs().max())
    status = "right" if apart < TOLERANCE and most < 1e-3 else "wrong"
    have = [bool(model.sublayers(layer)) for layer in range(1, model.num_layers + 1)]
    parts = "sublayers" if all(have) else "some sublayers" if any(have) else "whole blocks"
    return Found(name, kind, status, f"{apart:.0e} nats, logits {most:.0e}", parts)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took longer than {MOST_SECONDS} s")


def survey(names: list[str]) -> list[Found]:
    """All cases of those names, or all there are."""
    rows = []
    signal.signal(signal.SIGALRM, _too_long)
    for name, (kind, settings) in cases().items():
        if names and name not in names:
            continue
        began = time.perf_counter()
        signal.alarm(MOST_SECONDS)
        with tempfile.TemporaryDirectory() as work:
            rows.append(found(name, kind, settings, Path(work)))
        print(f"{rows[-1]}  ({time.perf_counter() - began:.1f} s)", flush=True)
    return rows


def table(rows: list[Found]) -> str:
    """The text of `peelcli/docs/families.md`."""
    lines = [
        _ABOUT.format(version=transformers.__version__),
        "| model type | what is audited |",
        "| --- | --- |",
        *(f"| {row.name} | {_words(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


_ABOUT = """# Families

Every model type of which transformers {version} has a causal language model, built small and at random, opened by
peel, and compared with a plain forward pass of transformers on the same ids. Rows of several words are variants of a
type: narrow heads, state that is shared or not, mixtures and hybrids. A type that is refused in one form may be audited
in another: peel decides by the checkpoint, before it writes anything, and not by its name.

- *blocks and sublayers*: whole blocks, and attention and MLP by themselves.
- *whole blocks*: its attention and MLP cannot be silenced alone, because of how a block adds them up.
- *refused*: why. peel replaces one block at a time; a block that reads what an earlier block computed beside the hidden
  states has no right value then.
- *not tried*: a small model of this type could not be built or run by itself; the audit itself decides.

`python tests/bench/families.py --write` makes this file; `pytest -m long tests/bench/test_families.py` checks it.
"""
_WORDS = {
    "sublayers": "blocks and sublayers",
    "some sublayers": "blocks; sublayers in some",
    "whole blocks": "whole blocks",
}


def _words(row: Found) -> str:
    if row.status == "right":
        return _WORDS[row.sublayers]
    if row.status == "not built":
        return "not tried: " + row.detail.split(":")[0]
    why = row.detail.removeprefix("CheckpointError: ").split(" cannot be audited block by block: ")[-1]
    return f"{row.status}: " + re.split(r"[.:;] peel ", why)[0].replace("|", "/")


def main() -> None:
    """Print one line a checkpoint, and how many there are of each status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true", help="write peelcli/docs/families.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A config that is not tiny ends as a row of the table, not with the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (MOST_NBYTES, MOST_NBYTES))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = survey(options.names)
    for status in sorted({row.status for row in rows}):
        print(status, sum(row.status == status for row in rows))
    if options.write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
