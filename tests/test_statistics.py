"""The recorder of batch statistics against the formulas in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.checkpoint import checkpoint

from mabn_d2 import BRN2d, DoubleForward, MABN2d, MBN2d, centralize, set_norm_batch_size
from mabn_d2.data import make_synthetic_coco
from mabn_d2.engine import Trainer
from mabn_d2.engine.hooks import RecordStatistics
from mabn_d2.report.metrics import read_metrics, series
from mabn_d2.report.statistics import plot_statistics, recorded_layers, swing
from mabn_d2.statistics import StatisticsRecorder
from mabn_d2.training import follow_grad_scaler

from .helpers import load_tool
from .helpers.runs import cfg_for
from .helpers.workers import run_workers

NORMS = {
    "BN": nn.BatchNorm2d,
    "MABN": lambda c: MABN2d(c, buffer_size=3, warmup_iters=4, renorm_start_iter=5, momentum=0.5),
    "BRN": BRN2d,
    "MBN": MBN2d,
    "GN": lambda c: nn.GroupNorm(2, c),
}


def network(norm):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1), NORMS[norm](4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2), NORMS[norm](6),
    ]  # fmt: skip
    model = nn.Sequential(*layers)
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.weight, -1, 2)
    centralize(model)
    return model.double()


def batches(count, images=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        scale = 1 + 3 * torch.rand(images, 1, 1, 1, generator=generator, dtype=torch.float64)
        yield scale * torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64)


def train(model, recorder, count, loss=lambda out: out.pow(3).mean(), images=4):
    for x in batches(count, images):
        model.zero_grad()
        loss(model(x)).backward()
        if recorder is not None:
            recorder.step()


class Replay:
    """Keeps a layer's input and the gradient of its output, and computes the formulas from them."""

    def __init__(self, layer):
        self.layer, self.calls = layer, []
        layer.register_forward_hook(self.keep)

    def keep(self, layer, args, out):
        call = {"x": args[0].detach().clone()}
        out.register_hook(lambda d: call.update(d=d.clone()))
        self.calls.append(call)

    def expected(self, call, images=slice(None)):
        x, d = call["x"][images], call["d"][images]
        x, d = (t.transpose(0, 1).flatten(1) for t in (x, d))
        mean = x.mean(1, keepdim=True)
        var = (x - mean).square().mean(1, keepdim=True)
        y = (x - mean) / (var + self.layer.eps).sqrt()
        dy = d * self.layer.weight.detach()[:, None]
        vectors = {"mean": mean, "var": var, "grad_mean": dy.mean(1), "grad_dot": (y * dy).mean(1)}
        return {quantity: vector.norm().item() for quantity, vector in vectors.items()}


def values_of(recorder, layer, quantity):
    return [r.values for r in recorder.records if (r.layer, r.quantity) == (layer, quantity)]


@pytest.mark.parametrize("norm", NORMS)
def test_the_four_statistics_are_those_of_the_formulas(norm):
    model = network(norm)
    replays = {name: Replay(model[int(name)]) for name in ("1", "4")}
    with StatisticsRecorder(model) as recorder:
        train(model, recorder, 7)
    for name, replay in replays.items():
        for iteration, call in enumerate(replay.calls):
            for quantity, expected in replay.expected(call).items():
                ((value,),) = values_of(recorder, name, quantity)[iteration : iteration + 1]
                assert value == pytest.approx(expected, rel=1e-9), (name, quantity)


def test_mabn_gives_what_it_uses_itself():
    model = network("MABN")
    model[1].running_mean.uniform_(-0.5, 0.5)
    norm, replay = model[1], Replay(model[1])
    with StatisticsRecorder(model, ["1"]) as recorder:
        train(model, recorder, 12)
    shift = norm.running_mean[:, None]
    moments, psis, running = [], [], torch.ones(4, dtype=torch.float64)
    for i, call in enumerate(replay.calls):
        x, d = (call[key].transpose(0, 1).flatten(1) for key in "xd")
        x = x - shift
        moments.append(x.square().mean(1))
        averaged = moments[-1] if i < 3 else torch.stack(moments[-3:]).mean(0)
        r = ((averaged + norm.eps) / (running + norm.eps)).sqrt()
        r = r.clamp(1 / norm.renorm_clip, norm.renorm_clip) if i >= 5 else torch.ones(4)
        g = d * (norm.weight.detach() * r)[:, None]
        psis.append((g * x / (averaged + norm.eps).sqrt()[:, None]).mean(1))
        psi = psis[-1] if i < 3 else torch.stack(psis[-3:]).mean(0)
        running = 0.5 * running + 0.5 * averaged
        expected = {
            "second_moment": moments[-1], "second_moment_average": averaged, "running_var": running,
            "psi": psis[-1], "psi_average": psi,
        }  # fmt: skip
        for quantity, vector in expected.items():
            (value,) = values_of(recorder, "1", quantity)[i]
            assert value == pytest.approx(vector.norm().item(), rel=1e-9), (quantity, i)
    assert np.mean(values_of(recorder, "1", "clipped")) == 0


def test_the_share_of_clipped_channels_is_counted():
    norm = MABN2d(4, warmup_iters=0, buffer_size=1, renorm_start_iter=1, renorm_clip=2).double()
    x = torch.ones(2, 4, 3, 3, dtype=torch.float64)
    x[:, 1] *= 5
    x[:, 2] *= 0.01
    model = nn.Sequential(norm)
    with StatisticsRecorder(model) as recorder:
        for _ in range(3):
            model(x)
        recorder.step()
    assert values_of(recorder, "0", "clipped") == [(0, 0.5, 0.5)]


@pytest.mark.parametrize("norm", ["BN", "MABN"])
def test_each_normalization_batch_has_a_record(norm):
    model = network(norm)
    set_norm_batch_size(model, 2)
    replay = Replay(model[4])
    with StatisticsRecorder(model, ["4"]) as recorder:
        train(model, recorder, 2, images=5)
    for iteration, call in enumerate(replay.calls):
        groups = [replay.expected(call, slice(start, start + 2)) for start in (0, 2, 4)]
        for quantity in groups[0]:
            values = values_of(recorder, "4", quantity)[iteration]
            assert values == pytest.approx([group[quantity] for group in groups], rel=1e-9)


def test_recording_changes_nothing():
    models = [network("MABN") for _ in range(2)]
    with StatisticsRecorder(models[0]) as recorder:
        train(models[0], recorder, 6)
    train(models[1], None, 6)
    states = [model.state_dict() for model in models]
    gradients = [[p.grad for p in model.parameters()] for model in models]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_only_every_period_th_iteration_is_recorded_and_no_hook_is_left():
    model = network("BN")
    recorder = StatisticsRecorder(model, ["1"], period=3, start_iter=5)
    assert not model[1]._forward_hooks
    with recorder:
        train(model, recorder, 6)
    assert sorted({record.iteration for record in recorder.records}) == [6, 9]
    assert not model[1]._forward_hooks


def test_accumulated_batches_are_values_of_one_record():
    model = network("BN")
    with StatisticsRecorder(model, ["1"]) as recorder:
        for x in batches(2):
            model(x).sum().backward()
        recorder.step()
    for quantity in ("mean", "grad_dot"):
        ((one, other),) = values_of(recorder, "1", quantity)
        assert one != other


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_records(use_reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    plain, checkpointed = network("MABN"), Checkpointed(*network("MABN"))
    records = []
    for model in (plain, checkpointed):
        with StatisticsRecorder(model) as recorder:
            for x in batches(3):
                model(x.requires_grad_()).pow(2).mean().backward()
                recorder.step()
        records.append({record[:3]: record.values for record in recorder.records})
    assert records[0].keys() == records[1].keys()
    for key, values in records[0].items():
        assert values == pytest.approx(records[1][key], rel=1e-9), key


def test_gradients_are_those_of_the_unscaled_loss():
    class Scaler:  # the interface of torch.amp.GradScaler that is used
        def scale(self, loss):
            return loss * 1024

    records = []
    for scaler, factor in ((None, 1), (Scaler(), 1024)):
        model = network("MABN")
        for module in model.modules():
            if isinstance(module, MABN2d):
                module.grad_scaler = scaler
        with StatisticsRecorder(model, grad_scaler=scaler) as recorder:
            train(model, recorder, 3, lambda out, factor=factor: factor * out.pow(3).mean())
        records.append(recorder.records)
    for one, other in zip(*records):
        assert one[:3] == other[:3] and one.values == pytest.approx(other.values, rel=1e-9)


@pytest.mark.parametrize("norm", ["BN", "MABN"])
def test_under_autocast_and_a_loss_scale_the_records_are_those_without_the_scale(norm):
    records = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=2, enabled=enabled)
        model = network(norm).float()
        follow_grad_scaler(model, scaler)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with StatisticsRecorder(model, grad_scaler=scaler) as recorder:
            for x in batches(5):  # within which the scale grows twice
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(x.float()).float().pow(3).mean()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                recorder.step()
                optimizer.zero_grad()
        records.append(recorder.records)
    assert scaler.get_scale() == 4096
    for one, other in zip(*records):  # a power of 2 leaves all digits
        assert one[:3] == other[:3] and one.values == pytest.approx(other.values, rel=1e-5)


def record_a_worker(norms):
    """Records of one worker of several, which sees images of its own."""
    rank = torch.distributed.get_rank()
    return [records_of(network(norm), rank, distributed=True) for norm in norms]


def records_of(model, rank, distributed=False):
    trained = model
    if distributed:
        trained = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    with StatisticsRecorder(model) as recorder:
        train(trained, recorder, 4, images=4 + rank)
    return [tuple(record) for record in recorder.records]


def test_each_of_several_workers_records_its_own_batches(tmp_path):
    norms = ["BN", "MABN"]
    for rank, of_norms in enumerate(run_workers(2, record_a_worker, tmp_path, norms)):
        for norm, records in zip(norms, of_norms):
            expected = records_of(network(norm), rank)
            assert len(records) == len(expected)
            for one, other in zip(records, expected):
                assert one[:3] == other[:3] and one[3] == pytest.approx(other[3], rel=1e-9)


def test_empty_inputs_and_evaluation_are_not_recorded():
    model = network("MABN")
    with StatisticsRecorder(model) as recorder:
        model(torch.zeros(0, 3, 8, 8, dtype=torch.float64)).sum().backward()
        recorder.step()
        model.eval()
        model(next(batches(1)))
        recorder.step()
    assert recorder.records == []


def test_the_second_forward_of_double_forward_is_not_recorded():
    model = network("MBN")
    double_forward = DoubleForward(model)
    with StatisticsRecorder(model) as recorder:
        for x in batches(3):
            model(x).sum().backward()
            recorder.step()
            double_forward.renew()
    assert {len(record.values) for record in recorder.records} == {1}


def test_a_pattern_without_a_norm_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"matches 'layer1.\*'; its norms are 1, 4"):
        StatisticsRecorder(network("BN"), ["1", "layer1.*"])
    with pytest.raises(ValueError, match="period must be a positive integer, got 0"):
        StatisticsRecorder(network("BN"), period=0)


def test_the_hook_writes_the_last_normalization_batch_of_an_iteration(tmp_path):
    model = network("BN")
    set_norm_batch_size(model, 2)
    trainer = SimpleNamespace(
        model=model, _trainer=None, start_iter=0, iter=0, storage=EventStorage(),
        checkpointer=SimpleNamespace(save_dir=str(tmp_path)),
    )  # fmt: skip
    hook = RecordStatistics(["4"], 1)
    hook.trainer = trainer
    hook.before_train()
    replay = Replay(model[4])
    train(model, None, 1, images=4)
    hook.after_step()
    hook.after_train()
    written = read_metrics(str(tmp_path / "metrics.json"))[0]
    for quantity, expected in replay.expected(replay.calls[0], slice(2, 4)).items():
        assert written[f"statistics/4/{quantity}"] == pytest.approx(expected, rel=1e-9)


def test_the_swing_is_the_relative_deviation_beside_slow_changes():
    noise = np.random.default_rng(0).normal(0, 0.05, 4000)
    assert swing(7 * np.exp(noise)) == pytest.approx(0.05, rel=0.05)
    assert swing(np.geomspace(1, 1000, 4000) * np.exp(noise)) == pytest.approx(0.05, rel=0.05)
    assert np.isnan(swing(np.zeros(5)))


# ---- in a training run, and drawn --------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Output folders of two short runs of the trainer, one with BN and one with MABN."""
    folder = tmp_path_factory.mktemp("statistics")
    make_synthetic_coco(folder, train=4, val=2)
    outputs = {}
    for norm in ("BN", "MABN"):
        outputs[norm] = folder / norm
        options = [
            "MODEL.RESNETS.NORM", norm, "SOLVER.MAX_ITER", 5, "STATISTICS.ENABLED", True,
            "STATISTICS.PERIOD", 2, "STATISTICS.LAYERS", ["backbone.*.res[23].*", "roi_heads.*"],
            "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", (),
        ]  # fmt: skip
        trainer = Trainer(cfg_for(folder, outputs[norm], *options))
        trainer.train()
        assert not any(m._forward_hooks for m in trainer.model.modules())
    return outputs


LAYER = "backbone.bottom_up.res2.0.conv1.norm"


def test_a_run_writes_every_recorded_iteration_into_its_metrics(runs):
    for norm, output in runs.items():
        metrics = read_metrics(str(output / "metrics.json"))
        for quantity in ("mean", "var", "grad_mean", "grad_dot"):
            iterations, values = series(metrics, f"statistics/{LAYER}/{quantity}")
            assert iterations.tolist() == [0, 2, 4] and (values > 0).all()
        layers = recorded_layers(metrics)
        assert LAYER in layers and any(layer.startswith("roi_heads.") for layer in layers)
        assert not any("res4" in layer or "fpn" in layer for layer in layers)
        has_psi = any(f"statistics/{LAYER}/psi_average" in values for values in metrics.values())
        assert has_psi == (norm == "MABN")


@pytest.mark.parametrize("kind, begin", [("png", b"\x89PNG"), ("svg", b"<?xml")])
@pytest.mark.parametrize("options", [[], ["--all"], ["--layer", LAYER, "--labels", "two", "MABN"]])
def test_the_tool_draws_the_runs(runs, tmp_path, monkeypatch, capsys, options, kind, begin):
    picture = tmp_path / f"statistics.{kind}"
    arguments = [*map(str, runs.values()), "--out", str(picture), *options]
    monkeypatch.setattr("sys.argv", ["plot_statistics.py", *arguments])
    assert load_tool("plot_statistics").main() == 0
    assert picture.read_bytes().startswith(begin)
    out = capsys.readouterr().out
    names = ["two", "MABN"] if "--labels" in options else ["BN", "MABN"]
    assert str(picture) in out and all(f"| {name} | 0." in out for name in names)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layer", "stem"], "has no 'stem', it has backbone"),
        (["--out", "statistics.jpg"], "must end in .png or .svg"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_explained_in_one_line(
    runs, monkeypatch, capsys, options, message
):
    monkeypatch.setattr("sys.argv", ["plot_statistics.py", str(runs["BN"]), *options])
    assert load_tool("plot_statistics").main() == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_without_statistics_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0}\n')
    with pytest.raises(ValueError, match="has no statistics: train with STATISTICS.ENABLED True"):
        plot_statistics([str(tmp_path)], str(tmp_path / "a.png"))
