"""Each known failure of other libraries is named by a test, or by the page that says why not."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "pains.md"
ALL = {f"P{number}" for number in range(1, 76)}


def named_by_tests() -> set[str]:
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found |= set(re.findall(r"\bP\d+\b", ast.get_docstring(node) or ""))
    return found


def without_a_test() -> set[str]:
    table = PAGE.read_text().split("\n## Without a test\n")[1]
    return set(re.findall(r"^\| (P\d+) \|", table, re.MULTILINE))


def test_every_failure_is_named_once() -> None:
    tested, explained = named_by_tests(), without_a_test()
    assert tested <= ALL, sorted(tested - ALL)
    assert tested | explained >= ALL, f"missing: {sorted(ALL - tested - explained)}"
    assert not tested & explained
