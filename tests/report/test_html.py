"""The HTML page as text: self-contained, small, and closed to whatever a checkpoint is called."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hand_made import RESULT, healthy, hostile, regressed, varied
from hypothesis import example, given, settings
from hypothesis import strategies as st
from long_series import series

from peelcli.errors import UsageError
from peelcli.records.printable import printable
from peelcli.report import html as page_html
from peelcli.report import page_data, render

pytest.importorskip("plotly")
CLOSING = "</script></title></style><img src=x onerror=alert(1)>\" ' <!-- \x1b[31m\n\u2028\udc80"


class Page(HTMLParser):
    """Elements with their attributes, text, and the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.cdata_elem == "script" else self.text).append(data)

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    @property
    def data(self):
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[0])))


def page(*results, **options) -> Page:
    return Page(render(results, "html", **options))


def test_it_names_what_is_flagged_and_why():
    found = page(RESULT)
    words = " ".join(" ".join(found.text).split())
    assert "ckpt-5000" in words
    assert "3 of 5 audited layers flagged (layers 2, 3, 5)" in words
    assert "! 3 surpassed +0.0100 +0.0060 +0.0140 identity attention" in words
    assert "dropping its attention lowers the loss by 0.0100" in words
    (run,) = found.data["runs"]
    assert run["flagged"] == [2, 3, 5]
    assert found.data["texts"][run["why"][2]].startswith("dropping its attention")
    assert found.data["tried"]["3"][0][:2] == ["identity attention", "+0.0100"]


def test_it_asks_nothing_of_the_network_and_runs_no_script_but_its_own():
    found = page(RESULT, *series(6, 4))
    for tag, attributes in found.elements:
        assert not {"src", "href", "action", "srcset", "style"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not {"link", "iframe", "img", "object", "base", "form"} & set(found.tags)
    (policy,) = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    hashes = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found.scripts[1:]}
    assert len(hashes) == 2
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split("; ")[1]


def test_it_is_ascii_and_the_same_each_time():
    text = render([RESULT, hostile("é→𝄞")], "html")
    assert text.isascii()
    assert text == render([RESULT, hostile("é→𝄞")], "html")
    assert "\r" not in text


@given(st.text(min_size=1, max_size=60))
@settings(max_examples=10, deadline=None)
@example(CLOSING)
def test_no_name_adds_an_element_or_is_lost(name):
    plain, found = page(hostile("x"), RESULT, hostile("x")), page(hostile(name), RESULT, hostile(name))
    assert found.tags == plain.tags
    assert len(found.scripts) == 3
    assert printable(name) in "".join(found.text)
    assert all(text.isprintable() for text in found.data["texts"][0].split("\n"))


def test_escapes_of_javascript_stand_for_the_same_characters():
    assert page_html._javascript('"aé→𝄞"\r\n</script>') == '"a\\u00e9\\u2192\\ud834\\udd1e"\n<\\/script>'


def test_a_missing_library_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(page_html, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'peelcli\[html\]'"):
        render([RESULT], "html")


def test_top_leaves_layers_out_of_tables_and_charts():
    found = page(RESULT, top=2)
    assert found.data["layers"] == [3, 5]
    assert found.data["runs"][0]["cells"][0] == ["3", "5"]
    assert "3 left out by --top" in " ".join(found.text)
    with pytest.raises(UsageError, match="--top 0"):
        page(RESULT, top=0)


def test_runs_without_layers_paths_or_finite_figures_are_shown():
    empty = varied(
        layers=(), flagged=(), network={"ce": float("nan"), "flags": ("broken",)}, network_flagged=True
    )
    for results in ([empty], [empty, healthy()], [healthy(), empty]):
        assert page(*results).data["runs"][0]["ce"] in (None, 1.86)


def test_what_is_too_large_loses_words_about_effective_layers_only(monkeypatch):
    results = series(12, 10)
    whole = page_data.packed(results)
    monkeypatch.setattr(page_data, "LARGEST", len(whole) - 1)
    brief = json.loads(gzip.decompress(base64.b64decode(page_data.packed(results))))
    assert len(page_data.packed(results)) < len(whole)
    verdict = [name for name, _ in brief["columns"]].index("verdict")
    for run in brief["runs"][:-1]:
        for said, found in zip(run["why"], run["cells"][verdict], strict=True):
            assert (said is None) == (found == "effective")
    assert None not in brief["runs"][-1]["why"]


def test_of_many_maps_the_best_is_kept(monkeypatch):
    monkeypatch.setattr(page_data, "MOST_POINTS", 6)
    for result, run in zip(results := series(8, 2), page_data.page_data(results)["runs"], strict=True):
        assert len(run["maps"]) == 3
        assert run["maps"][0][1] == pytest.approx(result.network.bounds.yes.ce, rel=1e-4)


def test_what_changed_since_the_night_before_is_shown():
    found = page(regressed())
    words = " ".join(" ".join(found.text).split())
    assert "Changes since the baseline night-1, step 400" in words
    assert "2 regressed effective effective 0.0000 ±0.0000 direct ternary g128" in words
    assert "byte for byte what it was then" in words
    run = found.data["runs"][0]
    assert found.data["texts"][run["why"][1]].startswith("Regressed: byte for byte")
    bad = page(regressed(CLOSING, CLOSING))
    assert bad.tags == found.tags
