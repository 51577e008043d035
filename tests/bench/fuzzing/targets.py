"""Which file is damaged and which commands read it; and the sound files of each kind that the damage begins from."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import fuzzing
from fuzzing import data, server
from fuzzing.mutate import ANY, HOSTILE_TEXT, JSON, JSON_LINES, Mutate

TOKENS = "--fit-tokens 256 --select-tokens 128 --eval-tokens 256 --seq-len 32 --threads 1"
STEPS = "--direct-steps 1 --challenge-steps 1 --path-steps 1 --head-steps 1 --no-ladder --threads 1"
EXTRACT = f"extract {{ckpt}} --data {{ids.npy}} {TOKENS}"
AUDIT = f"audit {{ckpt}} --data {{ids.npy}} {TOKENS} {STEPS} -f json"
PICKLED = EXTRACT.replace("{ckpt}", "{pickled}")
WORDED = EXTRACT.replace("{ckpt}", "{worded}")
SEQ_LEN, ROWS, VOCABULARY = 32, 40, 97


@dataclass(frozen=True)
class Target:
    """A sound `file` of the ground, as a path in it, and the commands that are run over damaged copies of it.

    The file may be a whole checkpoint, a directory. `{name}` in a command is the path of what has that name.
    """

    file: str
    commands: tuple[str, ...]
    mutators: dict[str, Mutate] = field(default_factory=dict)

    @property
    def top(self) -> str:
        """The file, or the directory of the ground that holds it."""
        return self.file.partition("/")[0]


def _of(names: str) -> dict[str, Mutate]:
    return {name: mutate for name, mutate in data.MUTATORS.items() if name.startswith(names)}


def arguments(rng: random.Random, source: Path, target: Path) -> None:
    """Another command line: arguments left out, doubled, exchanged, hostile; as a JSON list."""
    words = rng.choice(json.loads(source.read_text(encoding="utf-8")))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(words))
        match rng.randrange(5):
            case 0:
                del words[at]
            case 1:
                words[at:at] = [words[at]]
            case 2:
                words.insert(
                    at, rng.choice(("--help", "--sed", "--", "-", "-o", "--layers", "--scheme", "-c", "-f"))
                )
            case _:
                words[at] = rng.choice((*HOSTILE_TEXT, "1e9", "1-3,2", "0", "cuda:9", "99999999999999999999"))
        words = words or ["audit"]
    target.write_text(json.dumps([word for word in words if _can_be_given(word)]), encoding="utf-8")


def _can_be_given(word: str) -> bool:
    """Whether a shell can pass a word on: no NUL, and no half of a pair of surrogates."""
    try:
        return b"\x00" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


READ_FIT = (
    "report {fit.h5} -f json",
    "explain 1 {fit.h5}",
    "verify {fit.h5} {ckpt} --layers 1-3",
    "report {fit.h5}",
)
TARGETS = (
    Target("ckpt/config.json", (EXTRACT, EXTRACT, AUDIT, f"{AUDIT} --dry-run"), JSON),
    Target("ckpt/generation_config.json", (EXTRACT,), JSON),
    Target("ckpt/model.safetensors.index.json", (EXTRACT,), JSON),
    Target("ckpt/trainer_state.json", (AUDIT,), JSON),
    Target("ckpt/model-00001-of-00002.safetensors", (EXTRACT, AUDIT), ANY),
    Target("pickled/pytorch_model.bin", (PICKLED,), ANY),
    Target("worded/tokenizer.json", (f"extract {{worded}} --data {{text.txt}} {TOKENS}",), JSON),
    Target("worded/tokenizer_config.json", (f"extract {{worded}} --data {{text.txt}} {TOKENS}",), JSON),
    Target("acts.h5", (f"fit {{acts.h5}} {STEPS}",), ANY),
    Target("fit.h5", READ_FIT, ANY),
    Target("ids.npy", (EXTRACT,), _of("ids.npy") | ANY),
    Target("ids.bin", (EXTRACT.replace("ids.npy", "ids.bin"),), _of("ids.bin") | ANY),
    Target("lines.jsonl", (WORDED.replace("ids.npy", "lines.jsonl"),), _of("lines.jsonl") | JSON_LINES),
    Target("text.txt", (WORDED.replace("ids.npy", "text.txt"),), _of("text.txt") | ANY),
    Target(
        "nightly.yaml", ("report {fit.h5} -c {nightly.yaml}", f"{AUDIT} -c {{nightly.yaml}} --dry-run"), ANY
    ),
    Target("baseline.json", ("report {fit.h5} --baseline {baseline.json}",), JSON),
    Target("history.jsonl", ("report {fit.h5} --history {history.jsonl}",), JSON_LINES),
    Target("arguments.json", ("{arguments.json}",), {"arguments": arguments}),
    Target("single", (EXTRACT.replace("{ckpt}", "{single}"), AUDIT.replace("{ckpt}", "{single}"))),
)


def all_targets() -> tuple[Target, ...]:
    """The targets with the mutators of every module that is here; those that none damages are left out."""
    found = {target.file: dict(target.mutators) for target in TARGETS}
    here = {module.name for module in pkgutil.iter_modules(fuzzing.__path__)}
    if "checkpoints" in here:
        found["single"] |= importlib.import_module("fuzzing.checkpoints").MUTATORS
    if "hdf5" in here:
        damage = importlib.import_module("fuzzing.hdf5").mutate
        for file in ("acts.h5", "fit.h5"):
            found[file] |= dict.fromkeys(
                ("structure", "structure again"), lambda rng, source, target: damage(source, target, rng)
            )
    if "text" in here:
        text = importlib.import_module("fuzzing.text")
        found["nightly.yaml"] |= {
            "yaml": _of_text(text.mutate_yaml),
            "yaml again": _of_text(text.mutate_yaml),
        }
        found["baseline.json"]["json of text"] = _of_text(text.mutate_json)
        found["history.jsonl"]["lines of text"] = _of_text(text.mutate_lines)
    return tuple(replace(target, mutators=found[target.file]) for target in TARGETS if found[target.file])


def _of_text(change: Callable[[str, random.Random], bytes]) -> Mutate:
    def mutate(rng: random.Random, source: Path, target: Path) -> None:
        target.write_bytes(change(source.read_text(encoding="utf-8"), rng))

    return mutate


def make_ground(ground: Path) -> None:
    """Make the sound files of each kind in `ground`; in children, as all that computes."""
    _require(server.run_apart(lambda: _make_inputs(ground), ground / "home", unlimited=True))
    audit = AUDIT.replace(" -f json", "")
    paths = {
        "acts.h5": f"{EXTRACT} -o {{acts.h5}}",
        "fit.h5": f"fit {{acts.h5}} {STEPS} -o {{fit.h5}}",
        "baseline.json": "report {fit.h5} --write-baseline {baseline.json}",
        "history.jsonl": f"{audit} --history {{history.jsonl}}",
    }
    for command in paths.values():
        _require(server.run(words_of(command, ground, ground), ground / "home", unlimited=True))


def check_ground(ground: Path) -> None:
    """Run every command on the sound files: one that failed on these would be no test of damaged ones."""
    for target in TARGETS:
        for command in dict.fromkeys(target.commands):
            if command != "{arguments.json}":
                _require(server.run(words_of(command, ground, ground), ground / "home"))


def _require(ended: server.Ended) -> None:
    if ended.code not in (0, 1) or b"Traceback" in ended.err:
        raise SystemExit(f"the sound files could not be made:\n{ended.err.decode(errors='replace')}")


def words_of(command: str, ground: Path, case: Path) -> list[str]:
    """The words of a command; a file that lies in `case` is taken from there, any other from the ground."""
    if command == "{arguments.json}":
        words: list[str] = json.loads((case / "arguments.json").read_text(encoding="utf-8"))
    else:
        words = command.split()
    return [
        _path_of(word[1:-1], ground, case) if word[:1] == "{" and word[-1:] == "}" else word for word in words
    ]


def _path_of(name: str, ground: Path, case: Path) -> str:
    return str(case / name if os.path.lexists(case / name) else ground / name)


def _make_inputs(ground: Path) -> None:
    """Tiny checkpoints, token ids, text, settings: all that no command of peel's writes."""
    from importlib.resources import files

    import numpy as np
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(ground / "ckpt", max_shard_size="25KB")
    model.save_pretrained(ground / "single")
    state = {"global_step": 5, "epoch": 0.5, "log_history": [{"loss": 2.0, "step": 5}], "max_steps": 10}
    (ground / "ckpt" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    (ground / "pickled").mkdir()
    torch.save(model.state_dict(), ground / "pickled" / "pytorch_model.bin")
    shutil.copy(ground / "ckpt" / "config.json", ground / "pickled")
    shutil.copytree(str(files("peelcli") / "demo" / "stuck"), ground / "worded")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, size=(ROWS, SEQ_LEN))
    np.save(ground / "ids.npy", ids)
    ids.astype(np.uint16).tofile(ground / "ids.bin")
    texts = [f"The cat sat on the mat, number {n}, and then it went home to sleep. " * 4 for n in range(200)]
    (ground / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in texts]
    (ground / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = "extract:\n  fit-tokens: 256\n  data: [ids.npy]\nfit:\n  scheme: ternary\nreport:\n  top: 3\n"
    (ground / "nightly.yaml").write_text(settings, encoding="utf-8")
    (ground / "arguments.json").write_text(
        json.dumps([c.split() for t in TARGETS for c in t.commands[:2]][:-1])
    )
