"""What a config says is read in one way, also where it says another thing for each layer."""

from __future__ import annotations

import pytest
import transformers

from peelcli.checkpoint.structure import head_dim, layer_counts, stated
from peelcli.errors import CheckpointError


def gemma4(**settings: object) -> transformers.Gemma4TextConfig:
    return transformers.Gemma4TextConfig(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=16,
        global_head_dim=32,
        **settings,
    )


def test_the_width_of_heads_is_read_by_layer() -> None:
    config = gemma4()
    assert stated(config, "head_dim") is None
    assert [head_dim(config, layer) for layer in (1, 2, 3, 4)] == [16, 32, 16, 32]


def test_the_width_of_heads_follows_from_the_width_of_the_model() -> None:
    assert head_dim(transformers.LlamaConfig(hidden_size=48, num_attention_heads=4), 1) == 12
    assert head_dim(transformers.MambaConfig(), 1) == 0


def test_every_number_of_layers_that_a_config_states_is_known() -> None:
    config = transformers.LongcatFlashConfig(num_layers=2)
    assert layer_counts(config)[0] == 4
    assert 2 in layer_counts(config)
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        layer_counts(transformers.PreTrainedConfig())
