"""The norm in the conditions of real Detectron2 training."""

import copy
import logging
import math

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mabn_d2.checkpoint import Checkpointer
from mabn_d2.engine import update_norm_statistics
from mabn_d2.layers import CenConv2d, MABN2d
from mabn_d2.training import average_norm_statistics

from .helpers.models import decays, small_cfg, statistics
from .helpers.workers import run_workers


def image(objects=2, seed=0, size=64):
    """An input of a Detectron2 model with ground truth."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(objects, 2, generator=random) * size / 2
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.cat([corner, corner + size / 3], dim=1))
    instances.gt_classes = torch.arange(objects) % 6
    masks = torch.zeros(objects, size, size, dtype=torch.bool)
    masks[:, 8:40, 8:40] = True
    instances.gt_masks = BitMasks(masks)
    pixels = torch.randint(0, 255, (3, size, size), generator=random).float()
    return {"image": pixels, "instances": instances, "height": size, "width": size}


def step(model, images):
    model.zero_grad()
    with EventStorage():
        losses = sum(model(images).values())
    losses.backward()
    return losses.item()


def test_training_goes_on_through_steps_without_proposals_and_images_without_annotation():
    torch.manual_seed(0)
    cfg = small_cfg("MABN", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals",
                    "MODEL.LOAD_PROPOSALS", True)  # fmt: skip
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    head = [m for m in model.roi_heads.modules() if isinstance(m, MABN2d)]
    for iteration in range(6):
        images = [image(0 if iteration % 2 else 2, iteration), image(0, iteration + 10)]
        for x in images:
            proposals = Instances((64, 64))
            number = 0 if iteration % 3 == 1 else 5
            boxes = torch.rand(number, 4) * 20
            boxes[:, 2:] += boxes[:, :2] + 1
            proposals.proposal_boxes = Boxes(boxes)
            proposals.objectness_logits = torch.zeros(number)
            x["proposals"] = proposals
        for x in images:
            if iteration % 3 == 1:  # ground truth would be appended to the proposals
                x["instances"] = x["instances"][:0]
        before = [norm.second_moment.count.item() for norm in head]
        assert math.isfinite(step(model, images))
        after = [norm.second_moment.count.item() for norm in head]
        assert (before == after) == (iteration % 3 == 1)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        assert all(s.isfinite().all() for s in statistics(model))


def test_frozen_stages_keep_their_statistics_to_the_bit_in_fine_tuning():
    torch.manual_seed(0)
    model = build_model(small_cfg("MABN", "MODEL.BACKBONE.FREEZE_AT", 3)).train()
    bottom_up = model.backbone.bottom_up
    frozen = nn.ModuleList([bottom_up.stem, bottom_up.res2, bottom_up.res3])
    for norm in frozen.modules():
        if isinstance(norm, MABN2d):
            norm.running_var.uniform_(0.5, 2)
    before, trained_before = statistics(frozen), statistics(bottom_up.res4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for seed in range(3):
        step(model, [image(seed=seed), image(seed=seed + 5)])
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(frozen)))
    assert not torch.equal(trained_before[1], statistics(bottom_up.res4)[1])
    assert all(isinstance(m, MABN2d) for n, m in frozen.named_modules() if n.endswith("norm"))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["SOLVER.WEIGHT_DECAY_NORM", 0.01],
        ["SOLVER.WEIGHT_DECAY_NORM", 0.01, "SOLVER.WEIGHT_DECAY_BIAS", None,
         "SOLVER.BIAS_LR_FACTOR", 1.0],
    ],
)  # fmt: skip
def test_mabn_gets_the_weight_decay_that_bn_gets(options):
    cfgs = [small_cfg(norm, *options) for norm in ("BN", "MABN")]
    models = [build_model(cfg) for cfg in cfgs]
    expected, actual = (decays(build_optimizer(c, m), m) for c, m in zip(cfgs, models))
    assert expected == actual
    assert actual["backbone.bottom_up.stem.conv1.norm.weight"] == cfgs[0].SOLVER.WEIGHT_DECAY_NORM
    lr = [{g["lr"] for g in build_optimizer(c, m).param_groups} for c, m in zip(cfgs, models)]
    assert lr[0] == lr[1]


def test_an_override_by_parameter_name_wins_over_the_decay_of_norms():
    overrides = {"weight": {"weight_decay": 0.5}}
    for norm in (nn.BatchNorm2d, MABN2d):
        model = nn.Sequential(CenConv2d(3, 4, 3), norm(4))
        groups = get_default_optimizer_params(model, weight_decay_norm=0.0, overrides=overrides)
        assert decays(groups, model)["1.weight"] == 0.5
        assert decays(groups, model)["1.bias"] == 0.0
    assert {p for g in get_default_optimizer_params(model) for p in g["params"]} == set(
        model.parameters()
    )


def test_detectron2s_amp_trainer_keeps_the_statistics_free_of_the_loss_scale(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # AMPTrainer insists on one
    monkeypatch.setattr(AMPTrainer, "_write_metrics", lambda *_, **__: None)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = CenConv2d(3, 4, 3, norm=MABN2d(4), bias=False)

        def forward(self, x):
            return {"loss": self.conv(x).square().mean() * self.conv(x).abs().mean()}

    batches = [torch.randn(2, 3, 8, 8) for _ in range(9)]
    nets = []
    for scale in (1.0, 2.0**12):
        torch.manual_seed(0)
        net = Net().train()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        trainer = AMPTrainer(net, batches, torch.optim.SGD(net.parameters(), 0.01),
                             grad_scaler=scaler)  # fmt: skip
        for _ in range(8):
            trainer.run_step()
        assert scaler.get_scale() > scale
        nets.append(net)
    for a, b in zip(*(net.state_dict().values() for net in nets)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bn_too", [False, True])
def test_population_statistics_are_the_mean_over_the_batches_with_fixed_weights(bn_too):
    torch.manual_seed(0)
    options = dict(buffer_size=2, warmup_iters=0, renorm_start_iter=0)
    layers = [CenConv2d(3, 4, 3, norm=MABN2d(4, **options)), nn.ReLU(), CenConv2d(4, 5, 3),
              MABN2d(5, **options)]  # fmt: skip
    model = nn.Sequential(*layers, *([nn.BatchNorm2d(5)] if bn_too else []))
    for _ in range(5):
        model(torch.randn(2, 3, 9, 9) * 3).sum().backward()
    buffers = {k: v.clone() for k, v in model.state_dict().items() if "second_moment" in k}
    batches = [torch.randn(n, 3, 9, 9) + 1 for n in (1, 2, 3)]
    update_norm_statistics(model, iter(batches), 3)
    x = torch.cat([layers[0]._conv_forward(b, layers[0].weight
                   - layers[0].weight.mean((1, 2, 3), keepdim=True), layers[0].bias)
                   for b in batches])  # fmt: skip
    torch.testing.assert_close(model[0].norm.running_var, x.square().mean((0, 2, 3)))
    for key, value in buffers.items():
        assert torch.equal(value, model.state_dict()[key])
    if bn_too:
        assert model[-1].running_mean.abs().sum() > 0
    frozen = copy.deepcopy(model).requires_grad_(False)
    before = frozen[0].norm.running_var.clone()
    update_norm_statistics(frozen, iter(batches[:1]), 1)
    assert torch.equal(before, frozen[0].norm.running_var)


def tiny(norm):
    return nn.Sequential(CenConv2d(3, 4, 3, bias=False), norm(4), nn.Conv2d(4, 2, 1))


def test_weights_trained_with_bn_are_announced_with_the_file(tmp_path, caplog):
    for name, norm in [("bn", nn.BatchNorm2d), ("mabn", MABN2d)]:
        torch.save({"model": tiny(norm).state_dict()}, tmp_path / f"{name}.pth")
    model = tiny(MABN2d)
    with caplog.at_level(logging.WARNING, "mabn_d2"):
        Checkpointer(model).load(str(tmp_path / "mabn.pth"))
        assert "BN" not in caplog.text
        Checkpointer(model).load(str(tmp_path / "bn.pth"))
        assert not caplog.text  # the function is kept
        Checkpointer(model, weights_import="as_is").load(str(tmp_path / "bn.pth"))
    assert f"{tmp_path / 'bn.pth'} holds weights of another norm: BN for 1 layers" in caplog.text


def test_the_keys_of_the_authors_release_load():
    norm = MABN2d(3, buffer_size=4, warmup_iters=0)
    for _ in range(6):
        norm(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    theirs = {key: norm.state_dict()[key] for key in ("weight", "bias")}
    theirs["running_var"] = norm.running_var.reshape(1, 3, 1, 1)
    theirs["iters"] = torch.tensor([6])
    theirs["buffer_x2"] = norm.second_moment.values.roll(1, 0)  # row t % 4 there
    theirs["buffer_gz"] = norm.psi.values.roll(1, 0)
    for prefix in ("", "backbone.bn1."):
        loaded = MABN2d(3, buffer_size=4, warmup_iters=0)
        model = (
            loaded if not prefix else nn.ModuleDict({"backbone": nn.ModuleDict({"bn1": loaded})})
        )
        model.load_state_dict({prefix + key: value.clone() for key, value in theirs.items()})
        for key, value in norm.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), key


def test_state_dicts_load_strictly_and_report_what_is_missing_otherwise():
    state = MABN2d(3).state_dict()
    assert set(state) == {"weight", "bias", "running_mean", "running_var", "second_moment.values",
                          "second_moment.count", "psi.values", "psi.count"}  # fmt: skip
    MABN2d(3).load_state_dict(state)
    bn = nn.BatchNorm2d(3).state_dict()
    bn["running_mean"].fill_(5)
    with pytest.raises(RuntimeError, match="psi.count"):
        MABN2d(3).load_state_dict(bn)
    loaded = MABN2d(3)
    result = loaded.load_state_dict(bn, strict=False)
    assert "psi.count" in result.missing_keys and not loaded.running_mean.any()


def train_unequally(folder):
    """Two layers under DDP; batches differ in size, one worker's is empty at times."""
    rank = comm.get_rank()
    torch.manual_seed(0)
    net = DistributedDataParallel(tiny(MABN2d), broadcast_buffers=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    torch.manual_seed(rank)
    for iteration in range(5):
        images = 0 if rank == 1 and iteration % 2 else 1 + rank
        loss = net(torch.randn(images, 3, 6, 6)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = statistics(net)
    average_norm_statistics(net)
    if rank == 0:
        torch.save({"model": net.module.state_dict()}, folder / "model.pth")
    dist.barrier()
    return before, statistics(net), list(net.module.parameters())


@pytest.mark.parametrize("workers", [2, 4])
def test_unequal_and_empty_batches_neither_hang_nor_spoil_the_workers(tmp_path, workers):
    results = run_workers(workers, train_unequally, tmp_path, tmp_path)
    for before, after, parameters in results:
        assert all(s.isfinite().all() for s in before + after)
        assert all(torch.equal(a, b) for a, b in zip(after, results[0][1]))
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][2]))
    counts = [[s.item() for s in before if s.dim() == 0] for before, _, _ in results]
    assert counts[0] == [5, 5] and counts[1] == [3, 3]
    assert [s.item() for s in results[0][1] if s.dim() == 0] == [3, 3]
    # A checkpoint of N workers is that of one: it loads on any number.
    model = tiny(MABN2d)
    model.load_state_dict(torch.load(tmp_path / "model.pth")["model"])
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), results[0][1]))


@pytest.mark.slow
def test_a_compiled_model_trains_and_evaluates_like_an_ordinary_one():
    torch.manual_seed(0)
    options = dict(buffer_size=3, warmup_iters=3, renorm_start_iter=5)
    plain = nn.Sequential(CenConv2d(3, 4, 3, norm=MABN2d(4, **options)), nn.ReLU(),
                          nn.Conv2d(4, 2, 3))  # fmt: skip
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin)
    for _ in range(8):
        x = torch.randn(2, 3, 8, 8)
        for model, run in ((plain, plain), (twin, compiled)):
            model.zero_grad()
            run(x).square().mean().backward()
        for a, b in zip(plain.parameters(), twin.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        for a, b in zip(plain.state_dict().values(), twin.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    plain.eval(), twin.eval()
    torch.testing.assert_close(plain(x), compiled(x), rtol=1e-4, atol=1e-6)
