"""States that are held are those in the file, however little room there is for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_scoring import extracted

from peelcli.fitting import cached_states
from peelcli.fitting.cached_states import CachedStates, StateData
from peelcli.storage.activations import ActivationFile


@pytest.mark.parametrize("held_nbytes", [0, 8 * 16 * 32 * 4, 2**20])  # none fits, four parts just fit, all do
def test_batches_are_what_the_file_holds(
    held_nbytes: int, save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_states, "_HELD_NBYTES", held_nbytes)
    model, path = extracted(save_model(), tmp_path)
    acts = ActivationFile(path)
    held = CachedStates(acts, model.device, model.dtype)
    for _ in range(2):
        for part, rows in acts.rows.items():
            for layer in (1, 2, 3):
                data = StateData(held, part, layer - 1, layer)
                for some in ([5, 0, 2], range(1, 4), [0]):
                    batch = data.batch(some)
                    chosen = [rows.start + r for r in some]
                    assert torch.equal(batch.ids, acts.ids[chosen])
                    for values, of in ((batch.inputs, layer - 1), (batch.targets, layer)):
                        assert torch.equal(values, acts.states(of, slice(None))[chosen].to(model.dtype))
                assert held.nbytes <= 4 * held_nbytes
    held.clear()
    assert held.nbytes == 0
    given = StateData(held, "select", acts.states(3, slice(None)), 1)
    assert torch.equal(given.batch(range(2)).inputs, acts.states(3, slice(None))[8:10])
    acts.close()
