"""The benchmark of inference."""

import pytest
import torch

from mabn_d2.benchmark.inference import benchmark_inference, format_results, make_networks
from mabn_d2.surgery.sites import is_norm

from .helpers import load_tool


def test_the_folded_networks_hold_no_norm_and_each_row_is_measured():
    networks = make_networks()
    counts = {name: sum(map(is_norm, network.modules())) for name, network in networks.items()}
    assert counts == {
        "BN folded": 0, "MABN folded": 0, "no norm": 0,
        "BN": 53, "MABN": 53, "IN": 53, "GN": 53, "LN": 53,
    }  # fmt: skip
    chosen = {name: networks[name] for name in ("BN folded", "MABN folded")}
    results = benchmark_inference(chosen, torch.randn(1, 3, 32, 32), rounds=2)
    assert [len(result.times) for result in results] == [2, 2]
    table = format_results(results).splitlines()
    assert len(table) == 4 and table[2].startswith("| BN folded |") and table[2].endswith("1.000 |")


@pytest.mark.parametrize("option", [["--rounds", "1"], ["--batch-size", "0"], ["--size", "x"]])
def test_a_wrong_option_is_refused_in_one_line(option, capsys):
    with pytest.raises(SystemExit) as error:
        load_tool("benchmark_inference").main(option)
    assert error.value.code == 2
    assert option[0] in capsys.readouterr().err
