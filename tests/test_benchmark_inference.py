"""The benchmark of inference."""

import csv

import pytest
import torch

from mabn_d2.benchmark.inference import (
    PAPER,
    Result,
    benchmark_inference,
    format_results,
    make_input,
    make_networks,
)
from mabn_d2.surgery.sites import is_norm

from .helpers import load_tool
from .helpers.settled import relative_error

CPU = torch.device("cpu")


def counts(networks):
    return {name: sum(map(is_norm, network.modules())) for name, network in networks.items()}


def of(norms):
    folded = {"BN folded": 0, "MABN folded": 0, "no norm": 0}
    return {**folded, "BN": norms, "MABN": norms, "IN": norms, "GN": norms, "LN": norms}


def test_the_folded_networks_hold_no_norm_and_each_row_is_measured():
    networks = make_networks()
    assert counts(networks) == of(53)
    x = torch.randn(1, 3, 32, 32)
    for norm in ("BN", "MABN"):
        assert relative_error(networks[f"{norm} folded"](x), networks[norm](x)) < 1e-4  # untrained
    chosen = {name: networks[name] for name in ("BN folded", "MABN folded")}
    results = benchmark_inference(chosen, x, 2, CPU)
    assert [len(result.times) for result in results] == [2, 2]


@pytest.mark.slow
def test_every_mask_rcnn_of_the_benchmark_finds_as_much():
    networks = make_networks("mask_rcnn")
    assert counts(networks) == of(65)
    x = make_input("mask_rcnn", 1, 64, CPU)
    with torch.no_grad():
        (expected,) = networks["BN"].eval()(x)
        for name in ("MABN folded", "no norm"):
            (found,) = networks[name](x)
            torch.testing.assert_close(
                found["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor
            )
    assert len(expected["instances"]) > 20 and expected["instances"].has("pred_masks")


def test_the_table_is_that_of_the_times_beside_the_papers():
    results = [Result("BN folded", [1.0, 2.0, 4.0]), Result("GN", [2.0, 4.0, 4.0])]
    rows = [line.split(" | ") for line in format_results(results, PAPER).splitlines()[2:]]
    assert [(row[1], row[3], row[4]) for row in rows] == [
        ("0.50", "1.000", "1.000 |"), ("0.25", "2.000", "2.394 |"),
    ]  # fmt: skip
    assert format_results(results).splitlines()[2].endswith("| 1.000 |")


def test_the_tool_prints_a_table_and_writes_it_and_a_chart(tmp_path, monkeypatch, capsys):
    linear = torch.nn.Conv2d(3, 1, 1)
    networks = dict.fromkeys(("BN folded", "GN"), linear)
    tool = load_tool("benchmark_inference")
    monkeypatch.setattr(tool, "make_networks", lambda model: networks)
    files = [tmp_path / "table.csv", tmp_path / "chart.png"]
    options = ["--csv", str(files[0]), "--chart", str(files[1]), "--device", "cpu"]
    tool.main(["--size", "8", "--rounds", "3", *options])
    table = capsys.readouterr().out.splitlines()[-2:]
    with open(files[0]) as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["BN folded", "GN"]
    for line, row in zip(table, rows):
        cells = [cell.strip() for cell in line.split("|")]
        assert float(cells[2]) == pytest.approx(1 / float(row["median_s"]), rel=0.1)
        assert float(cells[4]) == pytest.approx(float(row["time/BN folded"]), abs=1e-3)
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "option",
    [
        ["--rounds", "1"],
        ["--batch-size", "0"],
        ["--size", "x"],
        ["--model", "resnet"],
        ["--csv", "no/table.csv"],
        ["--chart", "chart.jpg"],
    ],
)
def test_a_wrong_option_is_refused_in_one_line(option, capsys):
    with pytest.raises(SystemExit) as error:
        load_tool("benchmark_inference").main(option)
    assert error.value.code == 2
    assert {*option} & {*capsys.readouterr().err.replace(":", " ").split()}
