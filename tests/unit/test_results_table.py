"""The README's figures are those of the result files."""

import json
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TABLE = runpy.run_path(str(ROOT / "benchmarks" / "table.py"))


def test_the_readmes_table_is_what_the_result_files_say() -> None:
    readme = (ROOT / "README.md").read_text()
    assert TABLE["updated"](readme) == readme


def write_result(path: Path, kernels: str, limit: int | None) -> dict[str, Any]:
    """As much of a result as tells its kind; ``limit``: bytes/s."""
    result = {
        "model": {"name": "model", "codec": "raw"},
        "machine": {"kernels": kernels, "disk_throttle": [{"read_bytes_per_s": limit}] if limit else []},
        "settings": {"temperature": None},
        "budget_bytes": 1,
        "name": path.name,
    }
    path.write_text(json.dumps(result))
    return result


def test_of_several_runs_of_a_kind_the_last_stands(tmp_path: Path) -> None:
    first = write_result(tmp_path / "bench-a.json", "avx2", None)
    last = write_result(tmp_path / "bench-b-run10.json", "avx2", None)
    write_result(tmp_path / "bench-b-run9.json", "avx2", None)
    limited = write_result(tmp_path / "bench-c.json", "avx2", 10**9)
    other = write_result(tmp_path / "bench-d.json", "amx", None)
    assert TABLE["last_runs"](list(tmp_path.iterdir())) == [last, limited, other]
    (tmp_path / "bench-b-run10.json").unlink()
    (tmp_path / "bench-b-run9.json").unlink()
    assert TABLE["last_runs"](list(tmp_path.iterdir())) == [first, limited, other]
