"""The README's figures are those of the result files."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readmes_table_is_what_the_result_files_say() -> None:
    readme = (ROOT / "README.md").read_text()
    assert runpy.run_path(str(ROOT / "benchmarks" / "table.py"))["updated"](readme) == readme
