"""The HDF5 files of fitted references and peeled paths: parts while a fit goes on, one `fit.h5` when it is whole."""

from peelcli.fitstore.fit_file import read_eval_ids, write_fit
from peelcli.fitstore.parts import load_witness, part_is_whole, read_part, write_part
from peelcli.fitstore.paths import PathParts, load_path, part_name, read_path_part, write_path_part
from peelcli.fitstore.witness import read_witness, replacing, write_witness

__all__ = [
    "PathParts",
    "load_path",
    "load_witness",
    "part_is_whole",
    "part_name",
    "read_eval_ids",
    "read_part",
    "read_path_part",
    "read_witness",
    "replacing",
    "write_fit",
    "write_part",
    "write_path_part",
    "write_witness",
]
