"""Which configs describe a decoder-only language model that transformers itself implements."""

from __future__ import annotations

import pytest
import transformers
from conftest import FAMILIES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from peelcli.checkpoint.files import require_decoder_only
from peelcli.errors import CheckpointError


def config(model_type: object, *architectures: str, **more: object) -> dict[str, object]:
    return {"model_type": model_type, "architectures": list(architectures), **more}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tested_family_passes(family: str) -> None:
    name, settings = FAMILIES[family]
    saved = getattr(transformers, name)(**settings).to_dict()
    require_decoder_only(saved)
    require_decoder_only({**saved, "architectures": [CAUSAL[saved["model_type"]]]})


@pytest.mark.parametrize(
    "accepted",
    [
        config("gpt2", "GPT2Model"),  # the base model: its head is tied to the embedding
        config("gpt2"),
        config("gpt2", "SomethingElse", "GPT2LMHeadModel"),
        config("llama", "LlamaForCausalLM", auto_map={"AutoModel": "code.Model"}),
        config("gemma3", "Gemma3ForConditionalGeneration"),
        config("llama4", "Llama4ForConditionalGeneration"),
        config("bart", "BartForCausalLM", is_encoder_decoder=False),
        config("bert", "BertLMHeadModel", is_decoder=True),
        config("mamba", "MambaForCausalLM"),
        {"model_type": "llama"},
    ],
)
def test_decoders_pass(accepted: dict[str, object]) -> None:
    require_decoder_only(accepted)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (config("t5", "T5ForConditionalGeneration", is_encoder_decoder=True), "encoder-decoder"),
        (config("t5", "T5ForConditionalGeneration"), "encoder-decoder"),
        (config("bart", "BartForConditionalGeneration"), "encoder-decoder"),
        (config("whisper", "WhisperForConditionalGeneration"), "encoder-decoder"),
        (config("llama", "LlamaForCausalLM", is_encoder_decoder=True), "encoder-decoder"),
        (config("bert", "BertForMaskedLM"), "is an encoder"),
        (config("bert", "BertModel"), "is an encoder"),
        (config("roberta"), "is an encoder"),
        (config("distilbert", "DistilBertForMaskedLM"), "no causal language model"),
        (config("vit", "ViTForImageClassification"), "no causal language model"),
        (config("llava", "LlavaForConditionalGeneration", text_config={"model_type": "llama"}), "multimodal"),
        (config("llama", "LlamaForSequenceClassification"), "another head"),
        (config("qwen2", "Qwen2ForRewardModel"), "another head"),
        (
            config("my_own", "MyOwnForCausalLM", auto_map={"AutoModel": "code.Model"}),
            "own code, which is not run",
        ),
        (config("my_own", "MyOwnForCausalLM"), "not known to transformers"),
        (config("my_own", text_config={"model_type": ["llama"]}), "not known to transformers"),
        (config(None), "model_type is None"),
        (config(["llama"]), "model_type is"),
        ({}, "model_type is None"),
    ],
)
def test_others_are_refused_with_the_reason(refused: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        require_decoder_only(refused)
    assert str(refused.get("model_type")) in str(caught.value)
