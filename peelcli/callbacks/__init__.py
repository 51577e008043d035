"""Callbacks for trainers: each saved checkpoint is audited in a separate process during the training.

    from peelcli.callbacks import PeelCallback            # transformers.Trainer
    from peelcli.callbacks import PeelLightningCallback   # Lightning

Each is imported where it is asked for, since nobody has need of both libraries.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PeelCallback", "PeelLightningCallback"]


def __getattr__(name: str) -> Any:
    if name == "PeelCallback":
        from peelcli.callbacks.hf_trainer import PeelCallback

        return PeelCallback
    if name == "PeelLightningCallback":
        from peelcli.callbacks.lightning import PeelLightningCallback

        return PeelLightningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
