"""Sequences from text begin where a training sequence could, alone, and never overlap."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from peelcli.calibration.starts import next_start
from peelcli.calibration.text import TextPool
from peelcli.errors import CalibrationError

BOS, EOS, FIRST = 0, 1, 3


def number_tokenizer(template: str | None = "<s> $A", **special: str | None) -> PreTrainedTokenizerFast:
    """The word `w7` is the id 7 + FIRST, so that ids tell which words of the text a sequence took."""
    words = {"<s>": BOS, "</s>": EOS, "<unk>": 2, **{f"w{i}": FIRST + i for i in range(6000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        marks = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in names.items() if token}
    )


NUMBERS = number_tokenizer()


def number_text(lengths: Sequence[int], between: str = "\n\n") -> tuple[str, set[int]]:
    """Paragraphs of the words w0, w1, …; and the numbers that begin one."""
    edges = np.cumsum([0, *lengths])
    paragraphs = [" ".join(f"w{i}" for i in range(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return between.join(paragraphs), set(edges[:-1].tolist())


def pool(documents: Sequence[str], tokenizer: object = NUMBERS, vocab_size: int = 6003) -> TextPool:
    return TextPool(documents, tokenizer, vocab_size, "some.txt")  # type: ignore[arg-type]


def cut(
    documents: Sequence[str], seq_len: int, count: int, tokenizer: object = NUMBERS, seed: int = 0
) -> np.ndarray:
    return pool(documents, tokenizer).rows(seq_len, count, np.random.default_rng(seed))[0]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(8, 24),
    st.integers(1, 60),
    st.sampled_from(["\n\n", "\n \n\n", "\n\n\n\n", "\n\t\n   "]),
)
def test_sequences_are_runs_of_the_text_from_paragraph_starts(
    lengths: list[int], seq_len: int, count: int, between: str
) -> None:
    text, starts = number_text(lengths, between)
    rows = cut([text], seq_len, count)
    assert len(rows) <= count
    assert rows.shape[1] == seq_len
    assert (rows[:, 0] == BOS).all()
    words = rows[:, 1:] - FIRST
    assert (np.diff(words, axis=1) == 1).all(), "a sequence is one uninterrupted stretch of the text"
    assert (words[1:, 0] > words[:-1, -1]).all(), "sequences do not overlap and keep the text's order"
    # No paragraph is as long as the distance that is searched, so each start is a paragraph's.
    if max(lengths) < seq_len:
        assert set(words[:, 0].tolist()) <= starts
    if sum(lengths) >= seq_len - 1:
        assert len(rows) >= 1


@pytest.mark.parametrize(("between", "pattern"), [("\n", r"(?<=\n)"), (". ", r"(?<=\. )"), (" ", r"(?<= )")])
def test_without_paragraphs_lines_then_sentences_then_words(between: str, pattern: str) -> None:
    bits = [" ".join(f"w{7 * i + j}" for j in range(7)) for i in range(200)]
    text = between.join(bits)
    tokenizer = byte_tokenizer(text)
    rows = cut([text], 32, 12, tokenizer)
    assert len(rows) == 12
    for row in rows:
        begin = text.index(tokenizer.decode(row[1:]))
        assert begin == 0 or re.compile(pattern).match(text, begin)


@pytest.mark.parametrize(
    ("documents", "place", "reach", "expected"),
    [
        (["ab\n\ncd"], (0, 0), 9, (0, 0)),
        (["ab\n\ncd"], (0, 1), 9, (0, 4)),
        (["ab\n\ncd\n\nef"], (0, 4), 9, (0, 4)),  # a token has taken the break with it
        (["ab\n\n  cd\n\nef"], (0, 5), 9, (0, 10)),
        (["a\nbc\nd"], (0, 3), 9, (0, 5)),  # never back to the line that is begun
        (["ab. cd ef"], (0, 1), 9, (0, 4)),
        (["ab cd\n\nef"], (0, 1), 4, (0, 3)),  # the paragraph is out of reach
        (["ab\ncd", "ef"], (0, 1), 9, (1, 0)),  # a document is better than a line
        (["ab\ncd" + "e" * 9, "ef"], (0, 1), 4, (0, 3)),
        (["ab\n\ncd", "ef"], (0, 1), None, (1, 0)),
        (["abcdef"], (0, 3), 9, (0, 3)),
        (["ab"], (0, 2), 9, None),
        (["ab"], (1, 0), 9, None),
        (["ab\n\ncd"], (0, 1), None, None),
    ],
)
def test_the_next_start(
    documents: list[str], place: tuple[int, int], reach: int | None, expected: tuple[int, int] | None
) -> None:
    assert next_start(documents, place, reach) == expected


def test_thinly_set_text_is_followed_as_far_as_it_takes() -> None:
    dense, _ = number_text([10] * 100)
    thin = (" " * 400).join(f"w{i}" for i in range(1000, 1100))
    rows = cut([thin + "\n\n" + dense], 24, 50)
    assert (rows[0, 1:] - FIRST == np.arange(1000, 1023)).all()
    thin_rows = rows[rows[:, 1] >= FIRST + 1000]
    assert (np.diff(thin_rows[:-1, 1:], axis=1) == 1).all()


def test_where_paragraphs_are_too_few_sequences_also_begin_within() -> None:
    text, _ = number_text([100] * 10)
    assert len(cut([text], 16, 10)) == 10
    assert len(cut([text], 16, 40)) == 40


def test_text_without_any_break_still_gives_sequences() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(3000))
    rows = cut([text], 16, 10, byte_tokenizer("ab"))
    assert len(rows) == 10


def byte_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """As GPT-2's: byte-level BPE, BOS and EOS are one token, and nothing is added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    mark = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=mark, eos_token=mark)


PROSE = "\n\n".join(
    f"Chapter {i}. The fox no. {i * 37} said: “Where’s the {i}th hen?”\nAnd {i * i} hens ran off…"
    for i in range(300)
)


def test_each_sequence_is_tokenised_on_its_own_from_its_start() -> None:
    tokenizer = byte_tokenizer(PROSE)
    for row in cut([PROSE], 48, 25, tokenizer):
        assert row[0] == tokenizer.bos_token_id, (
            "GPT-2's mark opens a sequence, though it is not added by itself"
        )
        begin = PROSE.index(tokenizer.decode(row[1:9]))
        assert PROSE[begin:].startswith("Chapter")
        alone = tokenizer(PROSE[begin : begin + 2000], add_special_tokens=False)["input_ids"]
        assert row[1:].tolist() == alone[:47]


def test_a_sentencepiece_prefix_stands_before_the_first_word() -> None:
    tokenizer = number_tokenizer()
    backend = tokenizer.backend_tokenizer
    words = {"<s>": BOS, "</s>": EOS, "<unk>": 2, **{f"▁w{i}": FIRST + i for i in range(500)}}
    backend.model = models.WordLevel(words, unk_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    rows = cut([number_text([20] * 20, "\n\n")[0].replace("\n\n", " \n\n ")], 12, 8, tokenizer)
    assert (rows[:, 0] == BOS).all()
    assert (rows[:, 1] >= FIRST).all(), "without the prefix the first word is unknown"


@pytest.mark.parametrize(
    ("template", "opening", "between"),
    [
        ("<s> $A", [BOS], [BOS]),
        ("<s> $A </s>", [BOS], [EOS, BOS]),
        ("$A </s>", [BOS], [EOS]),
        (None, [BOS], [EOS]),
    ],
)
def test_documents_follow_each_other_as_the_tokenizer_marks_them(
    template: str | None, opening: list[int], between: list[int]
) -> None:
    documents = [f"w{i} w{i + 1} w{i + 2}" for i in range(0, 300, 10)]
    rows = cut(documents, 8, 9, number_tokenizer(template))
    assert len(rows) == 9
    for row in rows.tolist():
        i = row[len(opening)]
        expected = [*opening, i, i + 1, i + 2, *between, i + 10, i + 11, i + 12, *between]
        assert row == expected[:8]


def test_without_bos_and_eos_the_report_says_so() -> None:
    documents = [f"w{i} w{i + 1} w{i + 2}" for i in range(0, 300, 10)]
    bare = pool(documents, number_tokenizer(None, bos_token=None, eos_token=None))
    rows, notes = bare.rows(8, 5, np.random.default_rng(0))
    assert bare.bos is None
    assert (rows >= FIRST).all()
    assert any("no BOS" in note for note in notes)
    assert any("without a mark" in note for note in notes)
    assert pool(documents).rows(8, 5, np.random.default_rng(0))[1] == ()


def test_documents_starts_are_preferred_where_there_are_enough() -> None:
    documents = [
        "\n\n".join(f"w{100 * i + 20 * j + k}" for j in range(5) for k in range(20)) for i in range(40)
    ]
    rows = cut(documents, 16, 20)
    assert ((rows[:, 1] - FIRST) % 100 == 0).all()
    more = cut(documents, 16, 100)
    assert len(more) == 100
    assert not ((more[:, 1] - FIRST) % 100 == 0).all()


@pytest.mark.parametrize("mark", ["</s>", "<|endoftext|>", "<s>"])
def test_a_spelt_out_end_of_document_is_a_mark_not_text(mark: str) -> None:
    text = f"\n{mark}\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(0, 300, 10))
    rows = cut([text], 8, 9)
    assert len(rows) == 9
    assert ((rows[:, 1] - FIRST) % 10 == 0).all()
    assert (rows[:, 4] == BOS).all()


def test_a_long_text_is_drawn_from_all_over_and_by_seed() -> None:
    text, _ = number_text([10] * 600)
    rows = cut([text], 12, 24)
    quarters = np.histogram(rows[:, 1], bins=4, range=(FIRST, FIRST + 6000))[0]
    assert len(rows) == 24
    assert quarters.min() >= 4
    np.testing.assert_array_equal(rows, cut([text], 12, 24))
    assert (rows[:, 1] != cut([text], 12, 24, seed=1)[:, 1]).any()


def test_a_text_little_longer_than_needed_is_also_drawn_from_all_over() -> None:
    text, _ = number_text([10] * 100)
    rows = cut([text], 12, 30)
    quarters = np.histogram(rows[:, 1], bins=4, range=(FIRST, FIRST + 1000))[0]
    assert len(rows) == 30
    assert quarters.min() >= 4


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts the characters that it is given."""

    seen = 0

    def __call__(self, text: str, **options: object) -> object:  # type: ignore[override]
        self.seen += len(text)
        return super().__call__(text, **options)


def test_a_large_text_is_not_tokenised_whole() -> None:
    plain = byte_tokenizer(PROSE)
    tokenizer = CountingTokenizer(
        tokenizer_object=plain.backend_tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    text = "\n\n".join([PROSE.replace("fox", f"fox {i}") for i in range(150)])
    rows = cut([text], 64, 24, tokenizer)
    assert len(rows) == 24
    assert tokenizer.seen > 24 * 64
    assert tokenizer.seen < len(text) / 20


def test_the_warning_of_a_too_long_text_does_not_reach_the_user(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer(PROSE)
    tokenizer.model_max_length = 16
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(cut([PROSE], 16, 8, tokenizer)) == 8
        assert not caplog.records
        tokenizer(PROSE)  # the control: this one does warn
        assert "longer than" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


class LetterTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, which has no offsets: one id a letter."""

    vocab_size = 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}

    def _tokenize(self, text: str, **options: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def test_a_tokenizer_without_offsets_serves_and_does_not_overlap() -> None:
    text, _ = number_text([2] * 800)
    rows = cut([text], 32, 150, LetterTokenizer())
    places = [text.index("".join(map(chr, row))) for row in rows]
    assert len(rows) > 80
    assert (np.diff(places) >= 32).all()
    assert all(place == 0 or text[place].isspace() for place in places)  # it has no BOS: at any word


def test_repetitive_text_gives_each_sequence_once() -> None:
    rows = cut(["\n\n".join(["w1 w2 w3 w4 w5 w6 w7 w8"] * 500)], 9, 24)
    assert len(rows) == len(np.unique(rows, axis=0)) < 24


def test_ids_beyond_the_checkpoint_name_id_place_and_vocabulary() -> None:
    text, _ = number_text([10] * 60)
    with pytest.raises(
        CalibrationError, match=r"token id \d+ at position \d+ of .* sequence \d+.* 200 entries"
    ):
        pool([text], vocab_size=200).rows(12, 24, np.random.default_rng(0))


@pytest.mark.parametrize("documents", [[], [""], [" \n\n\t "], ["</s>\n</s>"]])
def test_no_text_is_an_error(documents: list[str]) -> None:
    with pytest.raises(CalibrationError, match=r"some\.txt: expected text, found none"):
        pool(documents)


def test_a_tokenizer_that_makes_nothing_of_the_text_is_an_error() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(CalibrationError, match="no tokens at all"):
        pool(["ждать"], bare)


def test_real_sequences_begin_at_bos_and_a_paragraph(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "stories260K-hf")
    text = (shared / "tinystories.txt").read_text(encoding="utf-8")
    rows = TextPool([text], tokenizer, 512, "tinystories.txt").rows(256, 64, np.random.default_rng(0))[0]
    assert len(rows) == 64
    for row in rows:
        assert row[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in row[1:]
        begin = text.index(tokenizer.decode(row[1:]).lstrip()[:150])
        assert begin == 0 or text[begin - 2 : begin] == "\n\n"
        assert row.tolist() == tokenizer(text[begin : begin + 2000], verbose=False)["input_ids"][:256]
