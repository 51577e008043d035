"""What users of neighbouring tools reported in public, replayed on tiny checkpoints: here each comes out right."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import AUDIT, EXTRACT, Done, peel, save_ids, save_tiny

FLAGGED, USAGE, FAILED = 1, 2, 3
FAST = (*AUDIT, "--references", "identity", "--paths", "none")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint in several shards, its untied twin in one file, and token ids."""
    base = tmp_path_factory.mktemp("reports")
    save_tiny(base / "checkpoint-100", shard="15KB")
    save_tiny(base / "single", tie_word_embeddings=False)
    save_ids(base / "ids.npy")
    return base


@pytest.fixture(scope="module")
def audited(base: Path) -> Done:
    """The audit of the sound checkpoint, every network connection refused."""
    with pytest.MonkeyPatch.context() as patch:

        def refused(*_: object, **__: object) -> None:
            raise AssertionError("peel asked for the network")

        patch.setattr(socket.socket, "connect", refused)
        patch.setattr(socket, "getaddrinfo", refused)
        return audit(base, base / "checkpoint-100", "-f", "json")


def audit(base: Path, *arguments: object) -> Done:
    return peel(base / "home", "audit", *arguments, "--data", base / "ids.npy", *FAST)


@pytest.fixture
def ckpt(base: Path, tmp_path: Path) -> Path:
    """A copy of the sound checkpoint, to be changed."""
    return Path(shutil.copytree(base / "checkpoint-100", tmp_path / "ckpt"))


@pytest.fixture
def single(base: Path, tmp_path: Path) -> Path:
    """A copy of the one in a single file."""
    return Path(shutil.copytree(base / "single", tmp_path / "single"))


Tensors = dict[str, torch.Tensor]


def change(directory: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Rewrite the tensors of a checkpoint in a single file as `edit` gives them back."""
    file = directory / "model.safetensors"
    tensors = edit({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file, metadata={"format": "pt"})


def spoil(tensors: Tensors, name: str, value: float) -> Tensors:
    """One value of one tensor made `value`."""
    tensors[name].view(-1)[5] = value
    return tensors


def losses(base: Path, ckpt: Path, acts: Path) -> tuple[torch.Tensor, float]:
    """The token ids that peel runs a checkpoint over, (n_seq, seq_len), and its mean loss on them."""
    done = peel(base / "home", "extract", ckpt, "--data", base / "ids.npy", *EXTRACT, "-o", acts)
    assert done.code == 0, done.err
    with h5py.File(acts) as file:
        return torch.from_numpy(file["ids"][...].astype(np.int64)), float(file["nll"][...].mean())


def refused(base: Path, *arguments: object, code: int = FAILED) -> str:
    """The message of an audit that ends with `code`."""
    done = audit(base, *arguments)
    assert (done.code, done.out) == (code, ""), done.err
    assert "mistake in peel" not in done.err
    return done.err[done.err.index("error: ") :]


# -- weights -----------------------------------------------------------------------------------------------------------


def test_nan_in_one_weight_is_exit_code_one_with_the_layer_named(base: Path, single: Path) -> None:
    """GPTQModel#1497, OmniQuant#31, vllm#53537: a checkpoint with NaN passes, and the process ends with 0."""
    change(single, lambda tensors: spoil(tensors, "model.layers.1.mlp.down_proj.weight", float("nan")))
    done = audit(base, single, "-f", "json")
    assert done.code == FLAGGED
    assert "NaN" not in re.sub(r'"[^"]*"', "", done.out), "JSON knows no NaN"
    verdicts = {layer["layer"]: layer["verdict"] for layer in done.runs[0]["layers"]}
    assert verdicts[2] == "broken"
    assert "model.layers.1.mlp.down_proj.weight" in done.out


def remove_a_shard(ckpt: Path) -> None:
    sorted(ckpt.glob("model-*"))[1].unlink()


def cut_a_shard(ckpt: Path) -> None:
    shard = sorted(ckpt.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-64])


def leave_only_shards(ckpt: Path) -> None:
    (ckpt / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize("damage", [remove_a_shard, cut_a_shard, leave_only_shards])
def test_a_checkpoint_picked_up_half_written_is_refused(
    damage: Callable[[Path], None], base: Path, ckpt: Path
) -> None:
    """transformers#35580, Lightning#688: a job takes up a checkpoint that another is still writing."""
    damage(ckpt)
    message = refused(base, ckpt)
    assert str(ckpt) in message
    assert re.search(r"copy|download", message)


def test_a_git_lfs_pointer_is_named_with_the_command_that_fetches_the_weights(
    base: Path, single: Path
) -> None:
    """transformers#35580 and many like it: a clone without LFS holds pointers in place of weights."""
    (single / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    assert "git lfs pull" in refused(base, single)


def test_the_same_weights_under_another_step_are_reported(base: Path, audited: Done) -> None:
    """pythia#205, pythia#108: 86 of 154 branches of one model held the final weights."""
    later = shutil.copytree(base / "checkpoint-100", base / "checkpoint-200")
    done = audit(base, base / "checkpoint-100", later, "-f", "json")
    first, second = done.runs
    assert (first["step"], second["step"]) == (100, 200)
    assert "identical-checkpoint" in [finding["kind"] for finding in second["findings"]]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_that_torch_compile_or_ddp_prefixed_are_read(
    prefix: str, base: Path, single: Path, tmp_path: Path
) -> None:
    """nanoGPT#325: `_orig_mod.` before every name, and nothing loads."""
    plain = losses(base, single, tmp_path / "plain.h5")[1]
    change(single, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert losses(base, single, tmp_path / "prefixed.h5")[1] == plain


FORMATS = [
    ("__0_0.distcp", "distributed checkpoint"),  # verl#533
    ("iter_0000100/mp_rank_00/model_optim_rng.pt", "Megatron"),  # Megatron-LM#1508
    ("epoch=1.ckpt", "Lightning"),  # Lightning#688
    ("global_step500/mp_rank_00_model_states.pt", "zero_to_fp32"),
    ("adapter_model.safetensors", "merge_and_unload"),
]


@pytest.mark.parametrize(("name", "word"), FORMATS)
def test_another_tool_s_format_is_named_with_the_way_out(
    name: str, word: str, base: Path, tmp_path: Path
) -> None:
    """verl#533, Megatron-LM#1508: the error about a missing file says nothing of what the folder is."""
    path = tmp_path / "folder" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    message = refused(base, tmp_path / "folder")
    assert word in message
    assert name.split("/")[0] in message


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_fine_tune_under_its_own_name_is_found_by_structure(base: Path, single: Path) -> None:
    """TransformerLens#535, #929, tuned-lens#122, #129: a known model under a new name is not in the list."""
    config = json.loads((single / "config.json").read_text())
    config |= {"_name_or_path": "me/my-own-fine-tune", "architectures": ["LlamaForCausalLM"]}
    (single / "config.json").write_text(json.dumps(config))
    assert audit(base, single).code in (0, FLAGGED)


def test_a_model_that_is_no_decoder_says_so_and_is_no_success(base: Path, tmp_path: Path) -> None:
    """cockpit#29, WeightWatcher#15, #328: an obscure error, or every layer is skipped and the result is empty."""
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    message = refused(base, tmp_path / "bert")
    assert "'bert'" in message
    assert "is an encoder" in message


def test_a_tied_head_and_a_resized_vocabulary_have_the_model_s_own_loss(base: Path, tmp_path: Path) -> None:
    """tuned-lens#129: a vocabulary that was resized for new tokens no longer fits what the tool expects."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base / "checkpoint-100")
    model.resize_token_embeddings(103)
    model.save_pretrained(tmp_path / "resized")
    ids, nll = losses(base, tmp_path / "resized", tmp_path / "acts.h5")
    with torch.no_grad():
        plain = float(model.eval()(input_ids=ids, labels=ids).loss)
    assert nll == pytest.approx(plain, abs=1e-4)


# -- what is asked for, and how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["7", "2-9"])
def test_a_layer_filter_that_matches_nothing_is_an_error(layers: str, base: Path) -> None:
    """WeightWatcher#11, llm-compressor#91: the filter is ignored in silence, and all layers are done."""
    message = refused(base, base / "checkpoint-100", "--layers", layers, code=USAGE)
    assert layers.split("-")[-1] in message
    assert "3" in message, "how many there are"


def test_found_and_failed_have_codes_of_their_own_and_the_report_comes_first(
    base: Path, single: Path, audited: Done
) -> None:
    """llama.cpp#3361, pip-audit#424, #99, bandit#640: it fails and exits 0; found and crashed are one code."""
    change(single, lambda tensors: spoil(tensors, "model.layers.0.mlp.up_proj.weight", float("inf")))
    assert audited.code in (0, FLAGGED), audited.err
    found = audit(base, single, "-f", "json")
    assert found.code == FLAGGED
    assert found.runs[0]["flagged"]
    assert audit(base, single, "--exit-zero").code == 0
    remove = single / "config.json"
    remove.unlink()
    assert audit(base, single, "--exit-zero").code == FAILED, "only what was found can be forgiven"


def test_a_report_is_json_that_any_parser_reads(audited: Done) -> None:
    """bandit#640 and pip-audit#99: no report, or one that is none, where something failed."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(audited.out, parse_constant=refuse)["schema"] == "peel/report"


def test_a_local_path_needs_no_network_and_a_cpu_is_enough(audited: Done) -> None:
    """TransformerLens#754, #800: a local model is looked up online. optimum#1717: nothing runs without a GPU."""
    assert audited.code in (0, FLAGGED), audited.err
    assert len(audited.runs[0]["layers"]) == 3


def test_no_bars_off_a_terminal(audited: Done) -> None:
    """pip#13354, actions/runner#4337: progress bars and control characters ruin the logs of CI."""
    assert not re.search(r"[\r\x1b█━]", audited.err + audited.out)


def test_the_need_of_disk_and_memory_is_said_before_any_work(base: Path, tmp_path: Path) -> None:
    """llm-compressor#1410, auto-round#1544: after 40 minutes it turns out that it does not fit."""
    done = audit(base, base / "checkpoint-100", "--dry-run", "-o", tmp_path / "work")
    assert done.code == 0
    assert re.search(r"disk +[\d.]+ MB", done.out)
    assert re.search(r"memory +[\d.]+ [MG]B", done.out)
    assert not list(tmp_path.rglob("*.h5*"))


def test_what_is_done_is_not_done_again_and_the_figures_stay(base: Path, audited: Done) -> None:
    """llm-compressor#2741, GPTQModel#3057, Model-Optimizer#1251: after a time limit everything begins anew."""
    again = audit(base, base / "checkpoint-100", "-f", "json")
    assert again.stages == set()
    assert again.runs == audited.runs


def test_the_same_seed_gives_the_same_figures(base: Path, audited: Done, tmp_path: Path) -> None:
    """mlx-lm#1759, BRECQ#14: the same seed, another result."""
    anew = audit(base, base / "checkpoint-100", "-f", "json", "-o", tmp_path / "work")
    assert "fit" in anew.stages
    assert anew.runs == audited.runs


def test_own_calibration_data_is_used_and_named(audited: Done) -> None:
    """lmdeploy#2923, mlx-lm#408: the calibration text is downloaded, and cannot be one's own."""
    run = audited.runs[0]
    assert run["data"] == "ids.npy"
    assert run["tokens"] == {"fit": 512, "select": 256, "eval": 512}


# -- files -------------------------------------------------------------------------------------------------------------


def test_bfloat16_states_are_read_by_h5py_alone_and_a_cut_file_is_named(base: Path, tmp_path: Path) -> None:
    """h5py#1101: bfloat16 in HDF5. keras#19091: a file that was cut short by a crash. nnsight#356: 740 GB."""
    acts = tmp_path / "acts.h5"
    options = ("--data", base / "ids.npy", *EXTRACT, "--store-dtype", "bfloat16", "--layers", "1", "-o", acts)
    assert peel(tmp_path, "extract", base / "checkpoint-100", *options).code == 0
    with h5py.File(acts) as file:
        states = file["states/001"]
        assert states.attrs["torch_dtype"] == b"bfloat16"
        values = (states[:1].astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(values).all()
    assert values.std() > 0
    acts.write_bytes(acts.read_bytes()[:-1000])
    done = peel(tmp_path, "fit", acts)
    assert (done.code, done.out) == (FAILED, "")
    assert "acts.h5" in done.err
    assert "mistake in peel" not in done.err
