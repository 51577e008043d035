"""Names that mean something to a terminal, a spreadsheet, Markdown, HTML, XML or a CI runner."""

from __future__ import annotations

HOSTILE = (
    *(
        "=cmd|' /C calc'!A0",
        "+1+1",
        "-2+3",
        "@SUM(1)",
        "\t=1",
        " =1",
        "＝1",
        "a\nb\r\nc",
        "x%0A::error::y",
        "a,b:c%",
    ),
    *("\n::error::z", "::stop-commands::t", "##[error]e", "<script>alert(1)</script>", "]]><x/>", "--><!--"),
    *(
        "&amp;&#65;",
        "\x1b[31m\x07\x9b2J\x00\ufffe",
        "\u202egpj.\u2028",
        "\udc80",
        "|a|b|",
        "`c`",
        "**b**",
        "_i_",
    ),
    *("[l](javascript:alert(1))", "![i](http://example.org/i.png)", "http://example.org", "www.example.org"),
    *("a@example.org", "@org/team", "#1 :boom:", "$x$", "~~s~~", "<img src=x onerror=alert(1)>", "{0} {{x}}"),
    *("\\", "\\|", "", " ", '"quoted"', "a'b", "1. one", "- two", "---", "2)", "===", "+"),
)
EVERY_NAME = "".join(HOSTILE)
SHORT = "=1,|a|`b`<script>]]>\x1b[31m\n%0A::error::x @org [l](http://e.org) \udc80"
