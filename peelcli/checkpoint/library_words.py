"""Quote a library's error without its advice, which addresses programmers who call the library.

Some of that advice is unsafe here (`trust_remote_code`), and some refers to output that peel does not show ("the above
report"). Each message of peel names its own remedy instead.
"""

from __future__ import annotations

import re

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
_ADVICE = re.compile(
    r"trust_remote_code|ignore_mismatched_sizes|weights_only|strict=|from_pretrained\(|above report|"
    r"TRAIN this model|pip install|conda install|huggingface-cli|hf auth|pull request|open an issue|file an issue|"
    r"https?://|`?[A-Z_]{4,}=[01]`?|^(please|if you|you should|you can|you may|make sure|consider|try|note that)\b",
    re.IGNORECASE,
)


def library_words(error: BaseException, longest: int = 400) -> str:
    """The sentences of `error` that say what was found, in one line, without a final full stop.

    Returns the name of the exception's class if no sentence is left.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(str(error)[: 8 * longest].strip()) if sentence]
    kept = " ".join(sentence for sentence in sentences if not _ADVICE.search(sentence)).rstrip(".!: ")
    if not kept:
        return type(error).__name__
    return kept if len(kept) <= longest else f"{kept[:longest]}..."
