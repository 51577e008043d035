"""Peeled paths: target maps, the walk that fits their prefixes once each, the search for promising ones, YES bounds."""

from peelcli.fitting.target_maps.bounds import best_map, yes_bound
from peelcli.fitting.target_maps.maps import (
    MOST_LAYERS_FOR_ALL,
    NAMED,
    TargetMap,
    all_maps,
    check_map,
    map_of_subset,
    named_map,
    subset_of_map,
)
from peelcli.fitting.target_maps.search import cheapest_maps, promising_maps, segments
from peelcli.fitting.target_maps.walk import BlockState, Fit, FittedPath, count_fits, peel, peel_all

__all__ = [
    "MOST_LAYERS_FOR_ALL",
    "NAMED",
    "Fit",
    "BlockState",
    "FittedPath",
    "TargetMap",
    "all_maps",
    "best_map",
    "cheapest_maps",
    "check_map",
    "count_fits",
    "map_of_subset",
    "named_map",
    "peel",
    "peel_all",
    "promising_maps",
    "segments",
    "subset_of_map",
    "yes_bound",
]
