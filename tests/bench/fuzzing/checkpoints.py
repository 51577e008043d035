"""Copies of a checkpoint in which one file was changed as damage, haste or malice would change it.

Each function takes a source of chance, a sound checkpoint and the directory to make; `MUTATORS` lists them by the file
that they change. What peel makes of a copy is for the caller to judge: a result, or an error in words.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Mutator = Callable[[random.Random, Path, Path], None]

_NUMBERS: list[Any] = [
    0,
    -1,
    1,
    2,
    3,
    5,
    7,
    2**16 + 1,
    10**7,
    10**8,
    10**9,
    2**31,
    2**63,
    10**30,
    1e9,
    0.5,
    -0.5,
    1e-40,
]
_ODD: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "16",
    "\ud800",
    "a\nb",
    "\x1b[2J",
    [],
    {},
    [1, 2],
    [[]],
    {"a": {}},
]
_ODD += [
    "float32",
    "auto",
    "int4",
    [0] * 100,
    ["full_attention"] * 3,
    float("nan"),
    float("inf"),
    -float("inf"),
]
# What configs of other families hold, and what has a meaning for transformers beside the sizes.
_MORE: dict[str, list[Any]] = {
    "_attn_implementation": [
        "flash_attention_2",
        "flash_attention_3",
        "flex_attention",
        "kernels-community/x",
        7,
    ],
    "attn_implementation": ["flash_attention_2", "paged|eager", {}],
    "attention_bias": [True],
    "architectures": [[], "LlamaForCausalLM", ["LlamaForSequenceClassification"], [7], {}],
    "auto_map": [{}, [], {"AutoConfig": "x--y.Z"}, {"AutoModelForCausalLM": 5}],
    "dtype": ["nonsense", 7, "int8", "complex64", {}],
    "torch_dtype": ["nonsense", 7, []],
    "fusion_config": [{"x": True}, 7],
    "head_dim": [10**9, 0, -4, 3, 1.5, "8"],
    "hidden_act": ["nonsense", 7, None, [], "gelu"],
    "id2label": [{}, [], {"x": "y"}, {"0": None}],
    "intermediate_size": [0, 10**9, 10**7, 1],
    "is_decoder": [False, 7],
    "layer_types": [["full_attention"], ["nonsense"] * 3, 7, ["sliding_attention"] * 3, [None] * 3],
    "max_position_embeddings": [0, 1, 7, 10**9, 10**12, -1],
    "num_attention_heads": [0, 3, 10**9],
    "num_hidden_layers": [0, 1, 2, 4, 10**7, 10**9],
    "num_key_value_heads": [0, 3, 10**9],
    "num_labels": [10**8, 0, -1, "x"],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "pad_token_id": [10**6, -1, -(10**6), "x", [0]],
    "pruned_heads": [{"0": [0]}, 7],
    "quantization_config": [
        {},
        7,
        [],
        {"quant_method": 7},
        {"quant_method": "gptq"},
        {"quant_method": "x", "bits": {}},
    ],
    "return_dict": [False, 7],
    "rope_parameters": [{}, 7, {"rope_type": "nonsense"}, {"rope_theta": 0.0, "rope_type": "default"}],
    "rope_scaling": [
        {"type": "linear"},
        {"type": "yarn", "factor": -1},
        {"rope_type": "longrope", "factor": 2},
        [],
    ],
    "rope_theta": [0, -1.0, 10**30, "x", None],
    "sliding_window": [0, 1, -1, 10**9],
    "text_config": [{}, 7, {"model_type": "llama"}, {"num_hidden_layers": 10**9}],
    "tie_word_embeddings": [True, False, 7],
    "torchscript": [True],
    "transformers_weights": ["model.safetensors", "../x", 7],
    "use_cache": [True, 7],
    "vocab_size": [0, 1, 10**9, 96, "97"],
}
_MODEL_TYPES = [
    "gpt2",
    "mistral",
    "mixtral",
    "bert",
    "t5",
    "mamba",
    "opt",
    "qwen3",
    "gemma3",
    "nonsense",
    "gpt_neo",
    7,
]
_TRAINER = [
    "[]",
    "7",
    "{",
    "[" * 100_000,
    '{"global_step": []}',
    '{"global_step": 1e400}',
    '{"global_step": -5}',
    "\xff",
]


def copy_of(source: Path, target: Path) -> Path:
    """A copy of the checkpoint `source`, with files of its own."""
    return shutil.copytree(source, target)


def config(rng: random.Random, source: Path, target: Path) -> None:
    """config.json: one to three settings of another value, type or name, one gone, or one deep in itself."""
    path = copy_of(source, target) / "config.json"
    values = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.choice(["known", "known", "number", "odd", "drop", "type", "deep"])
        key = rng.choice(sorted(values))
        if kind == "known":
            key = rng.choice(sorted(_MORE))
            values[key] = rng.choice(_MORE[key])
        elif kind == "number":
            values[key] = rng.choice(_NUMBERS)
        elif kind == "odd":
            values[key] = rng.choice(_ODD)
        elif kind == "drop":
            del values[key]
        elif kind == "type":
            values["model_type"] = rng.choice(_MODEL_TYPES)
        else:
            values[key] = _nested(rng.choice([10, 200, 900]))
    path.write_text(json.dumps(values))


def config_text(rng: random.Random, source: Path, target: Path) -> None:
    """config.json: bytes changed, cut short, or of another kind."""
    _scramble(rng, copy_of(source, target) / "config.json")


def generation_config(rng: random.Random, source: Path, target: Path) -> None:
    """generation_config.json: whatever it holds, peel does not generate."""
    file = copy_of(source, target) / "generation_config.json"
    odd = [
        "[]",
        "7",
        "{",
        "null",
        "",
        '"x"',
        '{"temperature": -5}',
        '{"max_length": "x"}',
        '{"cache_config": 7}',
    ]
    file.write_text(rng.choice([*odd, "[" * 100_000, json.dumps({"bos_token_id": _nested(90)})]))


def header(rng: random.Random, source: Path, target: Path) -> None:
    """The header of a safetensors file: names, dtypes, shapes and offsets that are not what they were, or its bytes."""
    file = copy_of(source, target) / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table, rest = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in table if name != "__metadata__"]
    entry, other = table[rng.choice(names)], table[rng.choice(names)]
    kind = rng.choice(
        [
            "dtype",
            "shape",
            "offsets",
            "overlap",
            "rename",
            "drop",
            "twice",
            "deep",
            "length",
            "bytes",
            "prefix",
        ]
    )
    if kind == "dtype":
        entry["dtype"] = rng.choice(["F16", "I64", "F4", "U8", "nonsense", 7, None])
    elif kind == "shape":
        entry["shape"] = rng.choice([[], [0], [-1], entry["shape"][::-1], [10**12], "x", [1.5], [2**62, 4]])
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice(
            [[0, 10**30], [-4, 0], [0], "x", [4, 0], entry["data_offsets"] * 2]
        )
    elif kind == "overlap":
        entry["data_offsets"] = other["data_offsets"]
    elif kind == "rename":
        name = rng.choice(names)
        table[rng.choice(["x", "", "a\nb", "model.layers.99.x", name + ".lora_A.weight"])] = table.pop(name)
    elif kind == "drop":
        del table[rng.choice(names)]
    elif kind == "prefix":
        table = {
            rng.choice(["module.", "policy.", "x."]) + n if n in names else n: v for n, v in table.items()
        }
    elif kind == "deep":
        table["__metadata__"] = _nested(500)
    text = json.dumps(table)
    if kind == "twice":
        text = text[:-1] + ", " + json.dumps({names[0]: table[names[0]]})[1:]
    data = text.encode()
    size = rng.choice([0, 1, 2**63, 10**9, length + 1]) if kind == "length" else len(data)
    file.write_bytes(struct.pack("<Q", size) + data + rest)
    if kind == "bytes":
        _scramble(rng, file, first=8 + length)


def contents(rng: random.Random, source: Path, target: Path) -> None:
    """The weights themselves: cut short, or a stretch of them overwritten."""
    _scramble(rng, copy_of(source, target) / "model.safetensors")


def index(rng: random.Random, source: Path, target: Path) -> None:
    """An index of shards that does not say what it should, or says it twice."""
    copy_of(source, target)
    (target / "model.safetensors").rename(target / "model-00001-of-00001.safetensors")
    names = list(load_file(target / "model-00001-of-00001.safetensors"))
    weight_map: Any = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    value: Any = {"metadata": {}, "weight_map": weight_map}
    kind = rng.choice(["sound", "metadata", "metadata", "map", "shard", "more", "less", "deep", "text"])
    if kind == "metadata":
        value = rng.choice([{"weight_map": weight_map}, {**value, "metadata": rng.choice(_ODD)}])
    elif kind == "map":
        value["weight_map"] = rng.choice(_ODD)
    elif kind == "shard":
        weight_map[rng.choice(names)] = rng.choice(["x.safetensors", "../x", "/dev/zero", 7, None, [], ""])
    elif kind == "more":
        weight_map["x"] = "model-00001-of-00001.safetensors"
    elif kind == "less":
        del weight_map[rng.choice(names)]
    elif kind == "deep":
        value["metadata"] = _nested(900)
    file = target / "model.safetensors.index.json"
    file.write_text(json.dumps(value))
    if kind == "text":
        _scramble(rng, file)


def tokenizer(rng: random.Random, source: Path, target: Path) -> None:
    """One of the tokenizer's files, where the checkpoint has any: a value changed, or its bytes."""
    copy_of(source, target)
    files = sorted(target.glob("*token*.json"))
    if not files:
        (target / "tokenizer.json").write_text(rng.choice(["{}", "[]", "7", "{"]))
        return
    file = rng.choice(files)
    if rng.random() < 0.5:
        _scramble(rng, file)
        return
    value = json.loads(file.read_text())
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        value[key] = rng.choice([*_ODD, *_NUMBERS, _nested(900)])
    file.write_text(json.dumps(value))


def trainer_state(rng: random.Random, source: Path, target: Path) -> None:
    """trainer_state.json, which tells the step: another type, another depth, other bytes."""
    file = copy_of(source, target) / "trainer_state.json"
    file.write_text(rng.choice([*_TRAINER, json.dumps({"log_history": _nested(900), "global_step": 5})]))


def pickled(rng: random.Random, source: Path, target: Path) -> None:
    """The same weights as a pickle, with bytes changed, something else in it, or keys that take for ever."""
    copy_of(source, target)
    state: dict[Any, Any] = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    file = target / "pytorch_model.bin"
    kind = rng.choice(["bytes", "bytes", "entry", "key", "legacy", "nested", "prefix"])
    if kind == "entry":
        state[rng.choice(list(state))] = rng.choice(
            [*_ODD, torch.zeros(1).expand(10**12), torch.eye(3).to_sparse()]
        )
    elif kind == "key":
        state[rng.choice([7, None, ("a", "b"), b"x", "a\nb", 1.5])] = torch.zeros(2)
    elif kind == "prefix":
        state = {f"module.{name}": value for name, value in state.items()}
    torch.save(state, file, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "bytes":
        _scramble(rng, file)
    elif kind == "nested":
        file.write_bytes(nested_key(rng.choice([4, 20, 34])))


def nested_key(depth: int) -> bytes:
    """A pickle of {key: 1} whose key holds the tuple one level below it twice, `depth` levels deep."""
    steps = b"".join(b"h%ch%c\x86q%c0" % (at, at, at + 1) for at in range(depth))
    return b"\x80\x02})q\x00" + b"0" + steps + b"h%cK\x01s." % depth


def many(rng: random.Random, source: Path, target: Path) -> None:
    """Thousands of tensors that hold nothing, or next to nothing, beside the weights or in their place."""
    file = copy_of(source, target) / "model.safetensors"
    shape, count = rng.choice([[0], [1], [0, 3]]), rng.choice([10_000, 300_000])
    size = 4 * shape[0]
    entry = '"model.layers.%d.w": {"dtype": "F32", "shape": %s, "data_offsets": [%d, %d]}'
    table = ", ".join(entry % (n, shape, n * size, (n + 1) * size) for n in range(count))
    data = f"{{{table}}}".encode()
    file.write_bytes(struct.pack("<Q", len(data)) + data + bytes(count * size))


MUTATORS: dict[str, Mutator] = {
    "config.json": config,
    "config.json as text": config_text,
    "generation_config.json": generation_config,
    "safetensors header": header,
    "safetensors contents": contents,
    "index": index,
    "tokenizer": tokenizer,
    "trainer_state.json": trainer_state,
    "pickle": pickled,
    "many tensors": many,
}


def _nested(depth: int) -> Any:
    value: Any = 7
    for at in range(depth):
        value = [value] if at % 2 else {"a": value}
    return value


def _scramble(rng: random.Random, file: Path, first: int | None = None) -> None:
    """Change the bytes of a file, of its `first` bytes alone where that is given; or cut it short."""
    raw = bytearray(file.read_bytes())
    end = min(first or len(raw), len(raw))
    kind = rng.choice(["flip", "flip", "cut", "zeros", "digit"])
    if kind == "cut":
        raw = raw[: rng.randrange(len(raw))]
    elif kind == "zeros":
        at = rng.randrange(end)
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    elif kind == "digit":
        digits = [at for at in range(end) if 48 <= raw[at] <= 57]
        if digits:
            raw[rng.choice(digits)] = rng.choice(b"0123456789")
    else:
        for _ in range(rng.choice([1, 1, 4, 20])):
            raw[rng.randrange(end)] = rng.randrange(256)
    file.write_bytes(raw)
