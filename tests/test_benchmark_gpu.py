"""The measurements on a GPU: how they are taken up, cut off and reported. They run on the dry GPU: make gpu-rehearsal."""

import csv
import os
import signal
import time

import numpy as np
import pytest
import torch

from mabn_d2.benchmark.gpu import STAGES, accuracy, correct
from mabn_d2.benchmark.gpu.report import write_report
from mabn_d2.benchmark.gpu.stage import Device, Options, Stage, run_stage
from mabn_d2.utils.results import Results

from .helpers import ROOT, load_tool

DEVICE = Device("A GPU", "2.11.0", "1.0")
LETTERS = "abcd"


@pytest.fixture
def bench(tmp_path):
    """Runs a stage with a case for each letter, each of which does what its script says."""
    path = tmp_path / "stage.csv"

    def run(limit=60.0, **scripts):
        def measure(case, options):
            with open(tmp_path / "log", "a") as log:
                log.write(case["letter"])
            scripts.get(case["letter"], lambda: None)()
            yield {"value": 0.5}
            yield {"value": np.float64(2)}

        cases = [{"letter": letter} for letter in LETTERS]
        stage = Stage("stage", path.name, ("letter",), ("value",), lambda options: cases, measure)
        results = Results(path, stage.keys, stage.values)
        options = Options(ROOT, tmp_path, tmp_path, deadline=time.monotonic() + limit)
        left = run_stage(stage, results, options, DEVICE)
        assert results.rows == rows()  # what is in memory is what is in the file
        measured = (tmp_path / "log").read_text()
        (tmp_path / "log").unlink()
        return measured, "".join(case["letter"] for case in left)

    def rows():
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    def remove(letter):
        kept = [line for line in path.read_text().splitlines(True) if not line.startswith(letter)]
        path.write_text("".join(kept))

    run.rows, run.remove = rows, remove
    return run


def fail():
    raise RuntimeError("two\nlines")


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(600)


def errors(rows):
    return {row["letter"]: row["error"] for row in rows if row["error"]}


def test_every_case_is_measured_once_and_its_rows_name_the_device(bench):
    assert bench() == ("abcd", "")
    rows = bench.rows()
    assert [row["letter"] for row in rows] == list("aabbccdd")
    assert [row["value"] for row in rows[:2]] == ["0.5", "2"]
    assert {(row["device"], row["torch"]) for row in rows} == {("A GPU", "2.11.0")}


def test_a_second_call_measures_what_is_missing_first_and_then_what_failed(bench):
    bench(a=fail, b=fail)
    assert errors(bench.rows()).keys() == {"a", "b"}
    bench.remove("c")
    assert bench(a=fail) == ("cab", "")
    assert errors(bench.rows()).keys() == {"a"}
    assert bench() == ("a", "")
    assert sorted(row["letter"] for row in bench.rows()) == list("aabbccdd")


@pytest.mark.parametrize(
    "script, error",
    [(fail, "RuntimeError: two lines"), (crash, "its process was ended by SIGKILL")],
)
def test_what_breaks_a_case_costs_this_case_only(bench, script, error):
    assert bench(b=script) == ("abcd", "")
    assert errors(bench.rows()) == {"b": error}
    assert sum(row["value"] != "" for row in bench.rows()) == 6


def test_a_case_is_cut_off_when_the_time_is_up_and_the_rest_is_left(bench):
    assert bench(limit=2, b=hang) == ("ab", "cd")
    assert errors(bench.rows()) == {"b": "cut off when the stage's time was up"}
    assert bench() == ("cdb", "")
    assert not errors(bench.rows())


def test_a_case_that_would_not_end_in_time_is_not_begun(bench):
    assert bench(limit=3, a=lambda: time.sleep(2)) == ("a", "bcd")
    assert not errors(bench.rows())


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "old.csv").write_text("letter,time\na,1\n")
    with pytest.raises(ValueError, match=r"old\.csv has the columns letter, time; expected letter"):
        Results(tmp_path / "old.csv", ("letter",), ("value",))


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_the_cases_of_a_stage_differ_and_are_told_apart_by_its_keys(stage, tiny, tmp_path):
    cases = stage.cases(Options(ROOT, tmp_path, tmp_path, tiny))
    assert all(tuple(case) == tuple(stage.keys) for case in cases)
    assert len({tuple(case.values()) for case in cases}) == len(cases) > 0


@pytest.mark.parametrize("wrong", [1.1e-4, np.nan, np.inf])
def test_an_error_beyond_the_tolerance_and_a_nan_are_not_ok(wrong):
    for value, ok in [(1e-5, "yes"), (wrong, "no")]:
        errors = correct.Errors(1e-4)
        errors.compare("output", torch.tensor([1 + value, 0.5]), torch.tensor([1.0, 0.5]))
        errors.compare("output", torch.ones(2), torch.ones(2))
        assert errors.row()["ok"] == ok


def test_the_runs_whose_accuracy_is_compared_have_one_length(tmp_path):
    options = Options(ROOT, tmp_path, tmp_path)
    assert accuracy.agreed_iterations(options) is None
    results = Results(tmp_path / "accuracy.csv", accuracy.STAGE.keys, accuracy.STAGE.values)
    results.replace({"norm": "BN", "images": "2"}, [{"error": "failed"}])
    assert accuracy.agreed_iterations(options) is None
    results.replace({"norm": "GN", "images": "2"}, [{"iterations": "1200"}])
    assert accuracy.agreed_iterations(options) == 1200


def test_a_shorter_run_keeps_the_proportions_of_the_demos_schedule(tmp_path):
    options = Options(ROOT, tmp_path, tmp_path)
    cfg = accuracy._config("BRN", 2, 1000, options)
    whole = accuracy._config("BRN", 2, 2000, options)
    assert (whole.SOLVER.STEPS, whole.MODEL.BRN.R_MAX_ITERS) == ((1600, 1850), (100, 800))
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == ((800, 925), 100)
    assert cfg.MODEL.BRN.R_MAX_ITERS == (50, 400)
    assert cfg.MODEL.MABN.RENORM_START_ITER == whole.MODEL.MABN.RENORM_START_ITER // 2


def test_the_report_has_a_table_of_each_file_and_ratios_to_bn(tmp_path):
    values = {
        "correct.csv": [dict(check="norm", norm="MABN", output_error="1e-3", tolerance="1e-4", ok="no")],
        "layers.csv": [
            dict(norm=norm, shape="a", norms=2, median_ms=ms, kernels_ms=ms, copy_share=0.5, peak_bytes=8)
            for norm, ms in [("BN", "1.5"), ("MABN", "3")]
        ],
        "training.csv": [
            dict(norm=norm, amp="off", images=2, steps=40, median_ms=ms, p10_ms=1, p90_ms=2)
            | dict(allocated_bytes=2**31, reserved_bytes=2**32)
            for norm, ms in [("BN", "100"), ("MABN", "102.5")]
        ],
        "inference.csv": [
            dict(batch="1", dtype="float32", network=name, median_ms=ms, iterations_per_s="9")
            for name, ms in [("BN folded", "2"), ("GN", "4")]
        ],
        "accuracy.csv": [dict(norm="GN", images="2", box_ap="20.94", mask_ap="16.1", seconds="9")],
    }  # fmt: skip
    files = {}
    for stage in STAGES.values():
        files[stage.file] = Results(tmp_path / stage.file, stage.keys, stage.values)
    for file, rows in values.items():
        rows = [{key: str(value) for key, value in row.items()} for row in rows]
        empty = dict.fromkeys(files[file].columns, "")
        files[file]._write([{**empty, "date": "2026-01-02", **row} for row in rows])
    key = {"norm": "BRN", "amp": "on"}
    files["training.csv"].replace(key, [{"error": "out of memory"}])
    write_report(tmp_path / "report.md", files, DEVICE)
    report = (tmp_path / "report.md").read_text()
    assert "A GPU, driver 1.0, PyTorch 2.11.0." in report and "rehearsal" not in report
    for line in [
        "0 of 1 rows are within their tolerance.",
        "| MABN | 2 | 6.000 | 2.00 | 6.000 | 2.00 | 50 % | 1.00 |",
        "| MABN | off | 102.5 | 1.0 | 2.0 | 1.025 | 2.00 | 4.00 |",
        "| BRN | on | out of memory |",
        "| 1 | float32 | GN | 4.000 | 9.0 | 2.000 |",
        "| GN | 2 |  |  | 20.9 | 16.1 | 9.0 |",
    ]:
        assert line in report, line
    write_report(tmp_path / "report.md", files, DEVICE._replace(device="Dry GPU"))
    assert "no time and no number below is a GPU's" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_the_tool_says_so_in_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        load_tool("benchmark_gpu").main(["--out", str(tmp_path)])
    assert exit.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.endswith("error: PyTorch finds no GPU; without one: make gpu-rehearsal")
    assert not list(tmp_path.iterdir())


def test_results_of_another_device_are_not_mixed_with_this_ones(tmp_path, monkeypatch, capfd):
    tool = load_tool("benchmark_gpu")
    stage = STAGES["layers"]
    row = {"device": "Another", "torch": "2.11.0"}
    case = dict.fromkeys(stage.keys, "a")
    Results(tmp_path / stage.file, stage.keys, stage.values).replace(case, [row])
    monkeypatch.setattr(tool, "find_device", lambda: DEVICE)
    with pytest.raises(SystemExit):
        tool.main(["--out", str(tmp_path)])
    error = capfd.readouterr().err
    assert "layers.csv has results of Another" in error and "name another folder" in error


@pytest.mark.parametrize("argv, named", [(["speed"], "'speed'"), (["--release", "no.py"], "no.py")])
def test_wrong_arguments_are_named_in_one_line(argv, named, capfd):
    with pytest.raises(SystemExit) as exit:
        load_tool("benchmark_gpu").main(argv)
    error = capfd.readouterr().err
    assert exit.value.code == 2 and named in error and error.count("\n") == 1
