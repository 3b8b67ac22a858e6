"""README.md and the pages on performance hold what ``benchmarks/tables.py`` makes of the kept results."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()


@pytest.mark.parametrize("page", tables.PAGES)
def test_pages_hold_the_tables_of_the_kept_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("<!-- tables ") == text.count("<!-- end -->") > 0
    name = tables.set_of(text)
    assert (
        re.search(rf"^python benchmarks/tables\.py {name}\b", text, re.MULTILINE)
        or page == "README.md"
    )
    assert tables.fill(text, tables.make_tables(name)) == text


def test_pages_show_only_plots_that_are_there() -> None:
    for page in (ROOT / page for page in tables.PAGES):
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert pictures
        assert all((page.parent / picture).is_file() for picture in pictures)


def test_fill_names_what_was_not_measured() -> None:
    page = "a\n<!-- tables x -->\nold\n<!-- end -->\nb\n<!-- tables y -->\n<!-- end -->\nc\n"
    filled = tables.fill(page, {"x": "new"})
    assert "old" not in filled and "\nnew\n" in filled
    assert filled.count("Not measured in this run.") == 1
    assert [line for line in filled.splitlines() if line in "abc" and line] == ["a", "b", "c"]
    assert tables.fill(filled, {"x": "new"}) == filled


def test_take_joins_folders_and_refuses_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    lines = (ROOT / "benchmarks" / "results" / "h100-2026-11-25-train.jsonl").read_text("utf-8")
    records = [json.loads(line) for line in lines.splitlines()]
    run = next(r for r in records if r["type"] == "run")
    results = [r for r in records if r["type"] == "result"]
    for number, sources in enumerate(("one", "one", "two")):
        made = {**run, "command": "bench --out /tmp/x", "platform": "some kernel"}
        made["machine"] = {**run["machine"], "sources": sources}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "results.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in (made, results[number]))
        )
    (path,) = tables.take([tmp_path / "0", tmp_path / "1"], "card-2000-01-01")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["type"] for r in kept] == ["run", "result"] * 2
    assert kept[0]["command"] == "bench" and "platform" not in kept[0]
    assert kept[1::2] == results[:2]
    with pytest.raises(SystemExit, match="other sources"):
        tables.take([tmp_path / "0", tmp_path / "2"], "card-2000-01-01")
