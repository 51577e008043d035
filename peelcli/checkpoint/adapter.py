"""Find a PEFT adapter among the files of a checkpoint, and say how to merge it into its base model."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from peelcli.checkpoint.json_files import read_object_if_whole

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model*"


@dataclass(frozen=True)
class Adapter:
    """The files of an adapter in one directory. `kind` and `base` are None where its config does not name them."""

    files: tuple[str, ...]
    kind: str | None  # such as "LORA"
    base: str | None  # the name or path of the model that it was trained on

    def __str__(self) -> str:
        kind = f"{self.kind!r} adapter" if self.kind else "adapter"
        base = f" of the base model {self.base!r}" if self.base else ", whose base model is not named"
        return f"{', '.join(self.files)}: a PEFT {kind}{base}"


def find_adapter(directory: Path) -> Adapter | None:
    """The PEFT adapter in `directory`; None if there is none."""
    names = sorted(path.name for path in directory.glob("adapter_*") if is_adapter_file(path.name))
    if not names:
        return None
    config = read_object_if_whole(directory / CONFIG)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    return Adapter(
        tuple(names[:3]), kind if isinstance(kind, str) else None, base if isinstance(base, str) else None
    )


def is_adapter_file(name: str) -> bool:
    """Whether PEFT saves a file of an adapter under this name."""
    return name == CONFIG or fnmatch(name, _WEIGHTS)


def how_to_merge(adapter: Adapter, directory: Path) -> str:
    """The instruction that merges an adapter into its base model, for an error message."""
    tokenizer = "copy the tokenizer's files of the base model beside them"
    if adapter.base is None:
        return (
            "merge it into its base model, which you have to name: "
            "`peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(BASE), "
            f"{str(directory)!r}).merge_and_unload().save_pretrained(MERGED)`; {tokenizer}, and name MERGED"
        )
    return (
        "merge it into that base: "
        f"`peft.AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}).merge_and_unload()"
        f".save_pretrained(MERGED)`; {tokenizer}, and name MERGED"
    )
