"""What an HDF5 file names outside itself is never followed, and what it holds is never larger than the file."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from stored import HARMFUL, N_SEQ, SEQ_LEN, save_activations, save_fit

from peelcli.cli.main import run as command
from peelcli.errors import ArtefactError
from peelcli.records import Reference
from peelcli.storage.activations import ActivationFile
from peelcli.storage.fit_writer import read_eval_ids
from peelcli.storage.parts import load_weights, read_part
from peelcli.storage.path_parts import read_path_part

FAILED = 3
LOSSES = f"references/{HARMFUL}/nll_eval"
Change = Callable[[h5py.File, str, Path], None]


def external_storage(file: h5py.File, name: str, secret: Path) -> None:
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def external_link(file: h5py.File, name: str, secret: Path) -> None:
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["values"] = file[name][()]
    del file[name]
    file[name] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "values")


def soft_link(file: h5py.File, name: str, _: Path) -> None:
    file.move(name, "elsewhere")
    file[name] = h5py.SoftLink("/elsewhere")


def second_name(file: h5py.File, name: str, _: Path) -> None:
    file["elsewhere"] = file[name]


def virtual(file: h5py.File, name: str, secret: Path) -> None:
    values = file[name][()]
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["values"] = values
    del file[name]
    layout = h5py.VirtualLayout(values.shape, values.dtype)
    layout[...] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "values", values.shape)
    file.create_virtual_dataset(name, layout)


def zipped(file: h5py.File, name: str, _: Path) -> None:
    values = file[name][()]
    del file[name]
    file.create_dataset(name, data=values, compression="gzip")


def unwritten(file: h5py.File, name: str, _: Path) -> None:
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape, dtype, chunks=shape)


def half_written(file: h5py.File, name: str, _: Path) -> None:
    values = file[name][()]
    del file[name]
    half = (len(values) // 2, *values.shape[1:])
    file.create_dataset(name, values.shape, values.dtype, chunks=half)[: half[0]] = values[: half[0]]


def records(file: h5py.File, name: str, _: Path) -> None:
    shape = file[name].shape
    del file[name]
    file[name] = np.zeros(shape, [("a", "f8")])


def references(file: h5py.File, name: str, _: Path) -> None:
    shape = file[name].shape
    del file[name]
    file.create_dataset(name, shape, h5py.ref_dtype)


CHANGES: list[Change] = [
    external_storage, external_link, soft_link, second_name, virtual, zipped, unwritten, half_written, records,
    references,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", [LOSSES, "trained/nll_eval"])
def test_a_fit_whose_losses_lie_elsewhere_is_refused(
    name: str, change: Change, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, secret = save_fit(tmp_path / "fit.h5"), tmp_path / "secret"
    secret.write_bytes(np.full(N_SEQ, 1.4142).tobytes())
    with h5py.File(fit, "r+") as file:
        change(file, name, secret)
    code = command(["report", str(fit), "-f", "json"])
    told = capsys.readouterr()
    assert (code, told.out) == (FAILED, "")
    assert f"fit.h5: '{name}' is damaged" in told.err
    assert "1.4142" not in told.err


@pytest.mark.parametrize("change", CHANGES[:8], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["ids", "nll", "states/001"])
def test_an_extraction_whose_states_lie_elsewhere_is_refused(
    change: Change, name: str, tmp_path: Path
) -> None:
    acts, secret = save_activations(tmp_path / "acts.h5"), tmp_path / "secret"
    secret.write_bytes(bytes(2**16))
    with h5py.File(acts, "r+") as file:
        change(file, name, secret)
        if name.startswith("states") and "torch_dtype" not in file[name].attrs:
            file[name].attrs["torch_dtype"] = "float32"
    with pytest.raises(ArtefactError, match=f"'{name}' is damaged"):
        ActivationFile(acts)


def test_groups_and_parts_are_read_through_the_same_door(tmp_path: Path) -> None:
    fit, part = save_fit(tmp_path / "fit.h5"), tmp_path / "part.h5"
    with h5py.File(fit, "r+") as file:
        external_storage(file, "ids_eval", tmp_path / "secret")
    with pytest.raises(ArtefactError, match="ids_eval"):
        read_eval_ids(fit)
    with h5py.File(part, "w") as file:
        file["references"] = h5py.ExternalLink(str(fit), "references")
        file["path"] = h5py.SoftLink("/references")
    for read in (read_part, read_path_part, lambda path: load_weights(path, Reference("identity", 1, 1))):
        with pytest.raises(ArtefactError, match="links are not followed"):
            read(part)


def test_a_small_file_takes_little_memory_whatever_it_says_it_holds(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in ("unwritten", "zipped", "hole"):
        acts = save_activations(tmp_path / f"{kind}.h5")
        with h5py.File(acts, "r+") as file:
            del file["ids"], file["nll"]
            if kind == "unwritten":
                file.create_dataset("ids", (6 * 2**30, SEQ_LEN), "i4", chunks=(2**20, SEQ_LEN))
            elif kind == "zipped":
                file.create_dataset("ids", data=np.zeros((2**20, SEQ_LEN), "i4"), compression="gzip")
            else:  # a sparse file: two gigabytes that take no room on the disk
                create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                space = h5py.h5s.create_simple((2**26, SEQ_LEN))
                h5py.h5d.create(file.id, b"ids", h5py.h5t.NATIVE_INT32, space, create)
        with pytest.raises(ArtefactError, match="'ids' is damaged"):
            ActivationFile(acts)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KB
