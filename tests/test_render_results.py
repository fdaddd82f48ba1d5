"""tools/render_results.py: what stands between the markers comes from stored runs, everything else stays."""

from pathlib import Path

import pytest

import provenance
import render_results

TEXT = "before\n\n<!-- results:compile_memory -->\nold\n<!-- /results:compile_memory -->\n\nafter\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One stored run, of one model of 2 MB that took 3 MB at its peak."""
    row = {
        "model": "tiny",
        "compiler": "elc_fx",
        "model_bytes": 2_000_000,
        "largest_convolution_float64_bytes": 1_000_000,
        "peak_bytes": 3_000_000,
        "kept_bytes": 2_000_000,
    }
    provenance.store(tmp_path / "compile_memory.json", provenance.collect(), {"rows": [row]})
    return tmp_path


def test_table_replaces_what_stands_between_its_markers(results: Path) -> None:
    filled = render_results.fill(TEXT, results)
    assert filled.startswith("before\n\n<!-- results:compile_memory -->\n")
    assert filled.endswith("<!-- /results:compile_memory -->\n\nafter\n")
    assert "| tiny" in filled
    assert "1.50" in filled
    assert "old" not in filled


def test_filling_twice_changes_nothing(results: Path) -> None:
    filled = render_results.fill(TEXT, results)
    assert render_results.fill(filled, results) == filled


def test_a_run_that_is_missing_is_said_to_be(tmp_path: Path) -> None:
    assert "Not measured yet." in render_results.fill(TEXT, tmp_path)


def test_unknown_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no table `typo`"):
        render_results.fill(TEXT.replace("compile_memory", "typo"), tmp_path)
