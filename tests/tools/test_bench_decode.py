"""The table of speeds: medians of processes, and ratios to the peers."""

import bench_decode
import pytest
from bench_decode import GENAI_INT4, Q4_0, measure, table, with_ratios
from click.testing import CliRunner

SPEEDS = {"ours": 30.0, GENAI_INT4: 40.0, Q4_0: 20.0}


def figures(decode: float) -> dict[str, float]:
    return {
        "decode_tokens_per_second": decode,
        "prefill_tokens_per_second": 10 * decode,
        "cpu_seconds_per_token": 1 / decode,
        "load_seconds": 0.5,
        "memory_bytes": 1e8,
    }


def test_contenders_take_turns_and_the_median_counts(monkeypatch):
    turns = []

    def run(kind, path, threads):
        turns.append((kind, threads))
        return figures(SPEEDS[kind] * (100 if len(turns) <= len(SPEEDS) else 1) / threads)

    monkeypatch.setattr(bench_decode, "run", run)
    rows = with_ratios(measure({name: (name, None) for name in SPEEDS}, [1, 2], 3))
    assert turns == [(name, threads) for _ in range(3) for threads in (1, 2) for name in SPEEDS]
    assert [row["decode_tokens_per_second"] for row in rows] == [30, 40, 20, 15, 20, 10]
    assert rows[0][f"decode_to_{GENAI_INT4}"] == 0.75 and rows[3][f"prefill_to_{Q4_0}"] == 1.5
    assert "| 1 | ours | 30 | 0.75 | 1.50 | 33.3 | 300 | 0.75 | 0.50 | 100 |" in table(rows)


def test_a_contender_that_fails_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"genai {tmp_path}: exit code 1"):
        bench_decode.run("genai", tmp_path, 1)


@pytest.mark.parametrize("threads", ["0", "x", "1,", ""])
def test_threads_that_are_no_numbers_are_refused(threads, tmp_path):
    result = CliRunner().invoke(bench_decode.main, [str(tmp_path), "--threads", threads])
    assert result.exit_code == 2 and "give numbers of 1 or more" in result.stderr


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    result = CliRunner().invoke(bench_decode.main, [str(tmp_path), "-o", str(tmp_path / "missing" / "decode.json")])
    assert result.exit_code == 2 and "missing is no folder" in result.stderr


def test_a_folder_without_an_onnx_package_is_refused_before_anything_is_made(tmp_path):
    result = CliRunner().invoke(bench_decode.main, [str(tmp_path), "--peers", str(tmp_path / "peers")])
    assert result.exit_code == 2 and "has no onnx/model.onnx" in result.stderr
    assert list(tmp_path.iterdir()) == []
