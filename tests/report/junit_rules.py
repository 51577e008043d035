"""What the two JUnit schemas in common use ask for: Ant's (windyroad's JUnit.xsd), and that of Jenkins' xUnit plugin.

Both are fetched from the network by those who use them; here their rules are written out, the stricter of the two for
each attribute, so that a test needs neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

TOKEN = re.compile(r"\S+( \S+)*")  # xs:token, at least one character
WHOLE, DECIMAL = re.compile(r"-?[0-9]+"), re.compile(r"[0-9]+(\.[0-9]{0,3})?")
WHEN = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}")
ANY = re.compile(r".*", re.DOTALL)
# Required attributes of each element, and what their values must match; no other attribute may stand there.
ATTRIBUTES = {
    "testsuites": {},
    "testsuite": {
        **dict.fromkeys(("name", "package", "hostname"), TOKEN),
        **dict.fromkeys(("id", "tests", "failures", "errors", "skipped"), WHOLE),
        "timestamp": WHEN,
        "time": DECIMAL,
    },
    "properties": {},
    "property": {"name": TOKEN, "value": ANY},
    "testcase": {"name": TOKEN, "classname": TOKEN, "time": DECIMAL},
    "failure": {"message": ANY, "type": ANY},
    "skipped": {"message": ANY, "type": ANY},
    "system-out": {},
    "system-err": {},
}
# The children of each element, in order, as a pattern over their names.
CHILDREN = {
    "testsuites": r"(testsuite )*",
    "testsuite": r"properties (testcase )*system-out system-err ",
    "properties": r"(property )*",
    "testcase": r"(skipped |failure )?",
}


def parsed_junit(text: str) -> Element:
    """The document, once it has been held against every rule. Raises AssertionError with all it violates."""
    root = ElementTree.fromstring(text.encode("ascii"))
    assert root.tag == "testsuites"
    wrong = [problem for element in root.iter() for problem in _violations(element)]
    assert not wrong, "\n".join(wrong)
    for number, suite in enumerate(root):
        assert suite.get("id") == str(number)
        for count, kind in (("failures", "failure"), ("skipped", "skipped")):
            assert int(suite.get(count, "-1")) == len(suite.findall(f"testcase/{kind}"))
        assert int(suite.get("tests", "-1")) == len(suite.findall("testcase"))
    return root


def _violations(element: Element) -> Iterator[str]:
    name = element.tag
    if name not in ATTRIBUTES:
        yield f"{name}: no such element"
        return
    rules = ATTRIBUTES[name]
    if set(element.attrib) != set(rules):
        yield f"{name}: attributes {sorted(element.attrib)}, expected {sorted(rules)}"
    for key, rule in rules.items():
        if not rule.fullmatch(element.get(key, "")):
            yield f"{name}: {key}={element.get(key)!r}"
    children = "".join(f"{child.tag} " for child in element)
    if not re.fullmatch(CHILDREN.get(name, ""), children):
        yield f"{name}: children {children}"
