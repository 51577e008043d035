"""The settings of peel, and how they are resolved from flags, environment and YAML.

Knows neither torch nor typer: the stages take a section as it is, the command line is generated from it.
"""

from peelcli.config.precedence import Configs, resolve, stray_variables, to_json
from peelcli.config.schemes import TrainedSchemeConfig
from peelcli.config.sections import (
    DTYPES,
    FLAGGABLE,
    FORMATS,
    SECTIONS,
    AuditConfig,
    ConsoleConfig,
    DeviceConfig,
    ExtractConfig,
    FitConfig,
    MachineConfig,
    ReportConfig,
    TrackConfig,
    WatchConfig,
    cache_directory,
    parse_duration,
    parse_layers,
    section_name,
)
from peelcli.config.yaml_file import load_yaml
from peelcli.records.schemes import SCHEMES

__all__ = [
    "DTYPES",
    "FLAGGABLE",
    "FORMATS",
    "SCHEMES",
    "SECTIONS",
    "AuditConfig",
    "TrackConfig",
    "Configs",
    "ConsoleConfig",
    "DeviceConfig",
    "ExtractConfig",
    "FitConfig",
    "MachineConfig",
    "ReportConfig",
    "TrainedSchemeConfig",
    "WatchConfig",
    "cache_directory",
    "load_yaml",
    "parse_duration",
    "parse_layers",
    "resolve",
    "section_name",
    "stray_variables",
    "to_json",
]
