"""What the second forward of MBN's training scheme renews, and that it changes nothing else."""

import copy
import random

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.engine import AMPTrainer, HookBase
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mabn_d2
from mabn_d2.data import make_synthetic_coco
from mabn_d2.engine import Trainer
from mabn_d2.engine.hooks import DoubleForward as DoubleForwardHook
from mabn_d2.layers import BRN2d, CenConv2d, MABN2d, MBN2d
from mabn_d2.surgery import set_norm_batch_size
from mabn_d2.training import DoubleForward

from .helpers.models import random_inputs, set_where_present, train_step
from .helpers.norms import assert_same_state, state
from .helpers.runs import cfg_for, train_a_worker
from .helpers.workers import run_workers

MBN = dict(memory_size=4, current_weight=0.6)
MABN = dict(buffer_size=2, warmup_iters=0, renorm_start_iter=0)


class Observer(nn.Module):
    """Counts its calls, draws random numbers, and shows what it sees to a list outside of the model."""

    def __init__(self, seen):
        super().__init__()
        self.look = seen.append
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last_size = len(x)  # an attribute that the first call makes
        self.total += 1
        self.look(
            (
                x.dtype,
                torch.is_grad_enabled(),
                random.random(),
                np.random.rand(),
                torch.rand(()).item(),
            )
        )
        return x

    def __deepcopy__(self, memo):
        return Observer([])


def network(seen=None):
    """With every norm of the package between two MBN."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), MBN2d(4, **MBN), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), Observer([] if seen is None else seen),
        CenConv2d(4, 4, 1), MABN2d(4, **MABN), BRN2d(4, r_max_iters=(0, 1), d_max_iters=(0, 1)),
        nn.Conv2d(4, 4, 1), MBN2d(4, **MBN),
    )  # fmt: skip


def batch(seed, images=2):
    return torch.randn(images, 3, 7, 7, generator=torch.Generator().manual_seed(seed)) * (
        1 + seed % 3
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def loss_of(y):
    """Not blind to the scale of what was normalized, as a sum of squares is."""
    return (y - torch.linspace(-2, 2, y.numel()).view_as(y)).square().sum()


def train(model, optimizer, *seeds):
    """Forward and backward of some mini-batches and the optimizer's step, without the second forward."""
    optimizer.zero_grad()
    for seed in seeds:
        loss_of(model(batch(seed))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def memory_state(model):
    """The state of all MBN."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, MBN2d)}
    assert norms
    return {
        f"{name}.{key}": value.clone()
        for name, norm in norms.items()
        for key, value in norm.named_buffers()
    }


def other_state(model):
    memories = memory_state(model)
    return {key: value for key, value in state(model).items() if key not in memories}


def random_states():
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [str(s) for s in np.random.get_state()],
    ]


def entries(norm):
    """The remembered statistics, the newest first."""
    count, size = norm.memory.count.item(), norm.memory.size
    return [norm.memory.values[(count - 1 - i) % size].clone() for i in range(min(count, size))]


def test_the_newest_entry_is_of_the_weights_after_the_step_and_older_ones_stay():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), MBN2d(4, **MBN), nn.ReLU(), nn.Conv2d(4, 4, 3), MBN2d(4, **MBN)
    )
    optimizer, double_forward = sgd(model), DoubleForward(model)
    conv, first, last = model[0], model[1], model[-1]
    for step in range(7):
        train(model, optimizer, step)
        stale = entries(first), entries(last)
        double_forward.renew()
        assert first.memory.count == last.memory.count == first.num_batches_tracked == step + 1
        for norm, before in zip((first, last), stale):
            now = entries(norm)
            assert len(now) == len(before) == min(step + 1, 4)
            assert (now[0] - before[0]).abs().max() > 1e-4  # the weights did move
            assert all(torch.equal(a, b) for a, b in zip(now[1:], before[1:]))
        x = conv(batch(step)).detach()
        expected = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)])
        torch.testing.assert_close(entries(first)[0], expected)


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_memory_is_that_of_a_forward_of_the_same_batches_from_the_state_before(seeds):
    model = network()
    optimizer, double_forward = sgd(model), DoubleForward(model)
    for step in range(6):
        before = memory_state(model)
        rng = torch.get_rng_state()
        micro_batches = [seed + 10 * step for seed in seeds]
        train(model, optimizer, *micro_batches)
        twin = copy.deepcopy(model)
        twin.load_state_dict({**other_state(twin), **before})
        torch.set_rng_state(rng)  # dropout draws the same masks
        with torch.no_grad():
            for seed in micro_batches:
                twin(batch(seed))
        double_forward.renew()
        assert_same_state(memory_state(model), memory_state(twin))
        assert model[1].memory.count == len(seeds) * (step + 1)


def test_gradient_accumulation_renews_the_entry_of_each_micro_batch_in_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MBN2d(4, memory_size=5))
    optimizer, double_forward = sgd(model), DoubleForward(model)
    train(model, optimizer, 7, 8)
    double_forward.renew()
    older = entries(model[1])
    train(model, optimizer, 0, 1, 2)
    double_forward.renew()
    now = entries(model[1])
    assert len(now) == 5
    assert all(torch.equal(a, b) for a, b in zip(now[3:], older))
    for entry, seed in zip(now, (2, 1, 0)):
        torch.testing.assert_close(entry[0], model[0](batch(seed)).detach().mean((0, 2, 3)))


def test_each_normalization_batch_is_renewed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MBN2d(4, memory_size=5))
    set_norm_batch_size(model, 2)
    optimizer, double_forward = sgd(model), DoubleForward(model)
    loss_of(model(batch(0, images=5))).backward()
    optimizer.step()
    double_forward.renew()
    x = model[0](batch(0, images=5)).detach()
    assert model[1].memory.count == 3
    for entry, group in zip(reversed(entries(model[1])), x.split(2)):
        torch.testing.assert_close(entry[0], group.mean((0, 2, 3)))


def test_nothing_but_the_memories_changes():
    seen = []
    model = network(seen)
    optimizer, double_forward = sgd(model), DoubleForward(model)
    observer = next(m for m in model if isinstance(m, Observer))
    for step in range(3):
        train(model, optimizer, step)
        random.random(), np.random.rand(), torch.rand(())
        before, memories, rng = other_state(model), memory_state(model), random_states()
        attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
        grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
        tensors = [*model.parameters(), *model.buffers()]
        double_forward.renew()
        assert_same_state(before, other_state(model))
        assert not torch.equal(memories["1.memory.values"], memory_state(model)["1.memory.values"])
        assert rng == random_states()
        assert attributes == {name: dict(vars(m)) for name, m in model.named_modules()}
        assert observer.calls == observer.total == step + 1 and model.training
        assert all(p.grad is grad and torch.equal(grad, copied)
                   for p, (grad, copied) in zip(model.parameters(), grads))  # fmt: skip
        assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()]))
    assert len(seen) == 6  # there was a second forward


def test_a_buffer_that_is_assigned_anew_is_put_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Counter(), MBN2d(4, **MBN))
    optimizer, double_forward = sgd(model), DoubleForward(model)
    train(model, optimizer, 0)
    double_forward.renew()
    assert model[1].calls == 1


def test_the_second_forward_draws_the_random_numbers_of_the_first():
    seen, masks = [], []
    model = network(seen)
    dropout = next(m for m in model if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda module, args, y: masks.append((y == 0) & (args[0] != 0)))
    optimizer, double_forward = sgd(model), DoubleForward(model)
    for _ in range(3):
        seen.clear(), masks.clear()
        train(model, optimizer, 0, 1)
        torch.rand(3), random.random(), np.random.rand()  # what others draw meanwhile
        double_forward.renew()
        assert [s[2:] for s in seen[:2]] == [s[2:] for s in seen[2:]]
        assert seen[0] != seen[1]
        assert len(masks) == 4
        # Where the value before is zero in neither forward, as ReLU's and the BN's outputs move.
        for first, second in zip(masks[:2], masks[2:]):
            assert (first == second).float().mean() > 0.99 and first.float().mean() > 0.2


def test_the_second_forward_is_without_gradient_and_leaves_no_graph():
    seen = []
    model = network(seen)
    optimizer, double_forward = sgd(model), DoubleForward(model)
    train(model, optimizer, 0)
    double_forward.renew()
    assert [s[1] for s in seen] == [True, False]
    assert torch.is_grad_enabled()


def test_forwards_in_evaluation_or_without_gradient_are_ignored():
    seen = []
    model = network(seen)
    optimizer, double_forward = sgd(model), DoubleForward(model)
    twin_seen = []
    twin = network(twin_seen)
    twin_optimizer, twin_double_forward = sgd(twin), DoubleForward(twin)
    for step in range(3):
        for net, opt, double, extra in [
            (model, optimizer, double_forward, True), (twin, twin_optimizer, twin_double_forward, False)
        ]:  # fmt: skip
            torch.manual_seed(step)
            train(net, opt, step)
            if extra:
                net.eval()(batch(98))
                with torch.no_grad():
                    net(batch(99))
                net.train()
            double.renew()
    assert_same_state(memory_state(model), memory_state(twin))
    before = memory_state(model)
    number = len(seen)
    model.eval()(batch(5))
    model.train()
    double_forward.renew()
    assert_same_state(before, memory_state(model))
    with torch.no_grad():
        model(batch(5))
    before = memory_state(model)
    double_forward.renew()
    assert_same_state(before, memory_state(model))
    assert len(seen) == number + 2


def test_a_second_renewal_or_one_after_removal_does_nothing():
    seen = []
    model = network(seen)
    optimizer, double_forward = sgd(model), DoubleForward(model)
    train(model, optimizer, 0)
    double_forward.renew()
    double_forward.renew()
    assert len(seen) == 2
    train(model, optimizer, 1)
    double_forward.remove()
    before = memory_state(model)
    double_forward.renew()
    train(model, optimizer, 2)
    double_forward.renew()
    assert len(seen) == 4
    assert model[1].memory.count == 3 and before["1.memory.count"] == 2


def test_a_frozen_norm_is_not_renewed_and_others_behind_it_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MBN2d(4), nn.Conv2d(4, 4, 3), MBN2d(4))
    model[1].requires_grad_(False)
    before = state(model[1])
    optimizer, double_forward = sgd(model), DoubleForward(model)
    train(model, optimizer, 0)
    stale = entries(model[3])
    double_forward.renew()
    assert_same_state(before, state(model[1]))
    assert len(stale) == len(entries(model[3])) == 1
    assert not torch.equal(stale[0], entries(model[3])[0])


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_is_in_the_second_forward_as_it_was_in_the_first(enabled):
    seen = []
    model = network(seen)
    optimizer, double_forward = sgd(model), DoubleForward(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = loss_of(model(batch(0)).float())
    loss.backward()
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
        double_forward.renew()
        assert torch.is_autocast_cpu_enabled() != enabled
    assert not torch.is_autocast_cpu_enabled()
    assert [s[0] for s in seen] == [torch.bfloat16 if enabled else torch.float32] * 2
    assert model[1].memory.values.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_inside_changes_nothing(use_reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    plain = network()
    plain[4] = nn.Identity()  # PyTorch's BN records a batch again when it is recomputed
    twin = copy.deepcopy(plain)
    # The reentrant variant needs an input that requires grad: the first convolution stays outside.
    twin = nn.Sequential(twin[0], Checkpointed(*twin[1:]))
    runs = [(net, sgd(net), DoubleForward(net)) for net in (plain, twin)]
    for step in range(5):
        for net, optimizer, double_forward in runs:
            torch.manual_seed(step)
            train(net, optimizer, step)
            double_forward.renew()
        for a, b in zip(plain.state_dict().values(), twin.state_dict().values()):
            if a.dim():  # the observer counts the recomputation too
                assert torch.equal(a, b)
        assert plain[1].memory.count == twin[1][0].memory.count == step + 1


class Failure(Exception):
    pass


def test_an_exception_in_the_second_forward_leaves_all_but_the_memories_as_it_was():
    model = network()
    optimizer, double_forward = sgd(model), DoubleForward(model)
    train(model, optimizer, 0)
    torch.rand(3), random.random(), np.random.rand()
    before, rng = other_state(model), random_states()
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    handle = model[-2].register_forward_hook(fail)
    with pytest.raises(Failure):
        double_forward.renew()
    assert_same_state(before, other_state(model))
    assert rng == random_states()
    assert attributes == {name: dict(vars(m)) for name, m in model.named_modules()}
    assert torch.is_grad_enabled() and not torch.is_autocast_cpu_enabled()
    handle.remove()
    train(model, optimizer, 1)  # goes on
    double_forward.renew()
    assert all(value.isfinite().all() for value in memory_state(model).values())


def fail(*_):
    raise Failure


def test_keyword_arguments_are_those_of_the_first_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), MBN2d(4)

        def forward(self, x, *, scale=1.0):
            return self.norm(self.conv(x) * scale)

    model = Net()
    optimizer, double_forward = sgd(model), DoubleForward(model)
    loss_of(model(batch(0), scale=3.0)).backward()
    optimizer.step()
    double_forward.renew()
    expected = model.conv(batch(0)).detach().mean((0, 2, 3)) * 3
    torch.testing.assert_close(entries(model.norm)[0][0], expected)


def train_with_ddp():
    """Memories and what they should be, of a worker whose batches have a size of their own."""
    rank = comm.get_rank()
    model = network()
    net = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer, double_forward = sgd(net), DoubleForward(model)
    pairs = []
    for step in range(4):
        before, x = (
            memory_state(model),
            batch(10 * rank + step, 1 + rank if step != 2 else 1 - rank),
        )
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss_of(net(x)).backward()
        optimizer.step()
        twin = copy.deepcopy(model)
        twin.load_state_dict({**other_state(twin), **before})
        torch.manual_seed(step)
        with torch.no_grad():
            twin(x)
        double_forward.renew()
        pairs.append((memory_state(model), memory_state(twin)))
    return pairs, [p.detach() for p in model.parameters()]


def test_every_worker_renews_its_own_memory_and_waits_for_none(tmp_path):
    (pairs0, parameters0), (pairs1, parameters1) = run_workers(2, train_with_ddp, tmp_path)
    for actual, expected in pairs0 + pairs1:
        assert_same_state(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(parameters0, parameters1))
    assert [pairs[-1][0]["1.memory.count"] for pairs in (pairs0, pairs1)] == [4, 3]


def retinanet():
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    mabn_d2.add_mabn_config(cfg)
    set_where_present(cfg, {"NORM": "MBN", "DEPTH": 18, "RES2_OUT_CHANNELS": 64, "FREEZE_AT": 0})
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def test_a_detector_with_a_moving_average_in_an_attribute_keeps_it():
    model = retinanet()
    double_forward = DoubleForward(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(2):
        train_step(model)
        optimizer.step()
        normalizer, before = model.loss_normalizer, other_state(model)
        stale = memory_state(model)
        with EventStorage():
            double_forward.renew()
        assert model.loss_normalizer == normalizer
        assert_same_state(before, other_state(model))
        now = memory_state(model)
        assert all(torch.equal(now[key], stale[key]) for key in now if key.endswith("count"))
        moved = [
            not torch.equal(now[key], stale[key]) for key in now if key.endswith("memory.values")
        ]
        assert all(moved) and len(moved) > 30  # also those of each feature level in the head


def test_a_loop_of_ones_own_logs_every_scalar_once_and_draws_on_the_same_iterations():
    model = retinanet()
    double_forward, optimizer = DoubleForward(model), torch.optim.SGD(model.parameters(), 1e-4)
    iterations = []
    model.register_forward_hook(lambda *_: iterations.append(get_event_storage().iter))
    forward = model.forward
    model.forward = lambda x: iterations.append(get_event_storage().iter) or forward(x)
    with EventStorage(3) as storage:
        for _ in range(3):
            sum(model.train()(random_inputs()).values()).backward()
            optimizer.step()
            double_forward.renew()
            storage.step()
    histories = storage.histories()
    assert "num_pos_anchors" in " ".join(histories)
    for name, history in histories.items():
        assert [iteration for _, iteration in history.values()] == [3, 4, 5], name
    assert sorted(iterations) == sorted([3, 4, 5] * 3)  # the hook, and both forwards


def test_inputs_that_the_loop_changes_in_place_are_renewed_as_they_were():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), MBN2d(4)

        def forward(self, batched, *, scale):
            return self.norm(self.conv(batched[0]["image"] * scale["by"][0]))

    model = Net()
    optimizer, double_forward = sgd(model), DoubleForward(model)
    batched, scale = [{"image": batch(0)}], {"by": [torch.tensor(3.0)]}
    loss_of(model(batched, scale=scale)).backward()
    batched[0]["image"].zero_()
    batched.append(batched.pop(0).clear())
    scale["by"][0] *= 0
    optimizer.step()
    double_forward.renew()
    expected = model.conv(batch(0) * 3).detach().mean((0, 2, 3))
    torch.testing.assert_close(entries(model.norm)[0][0], expected)


def test_an_input_that_was_computed_from_parameters_is_renewed():
    first, model = nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 4, 3), MBN2d(4))
    optimizer, double_forward = sgd(model), DoubleForward(model)
    x = first(batch(0))
    loss_of(model(x)).backward()
    optimizer.step()
    double_forward.renew()
    expected = model[0](x).detach().mean((0, 2, 3))
    torch.testing.assert_close(entries(model[1])[0][0], expected)


MODEL = [f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
MODEL = [item for key in MODEL for item in (key, "MBN")]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_synthetic_coco(folder, layout="shapes", train=20, val=4, size=64)
    return folder


class Recorder(HookBase):
    """Behind all other hooks, once per iteration."""

    def __init__(self):
        self.random_states = []

    def after_step(self):
        self.random_states.append(random_states())


def run(shapes, output, *options, resume=False, stop=None):
    """Trains in this process without evaluation; returns the trainer and the random states after each step."""
    torch.manual_seed(0)  # of the initialization
    trainer = Trainer(cfg_for(shapes, output, *MODEL, *options))
    trainer.resume_or_load(resume=resume)
    trainer._hooks = [hook for hook in trainer._hooks if type(hook).__name__ != "EvalHook"]
    recorder = Recorder()
    trainer.register_hooks([recorder])
    if stop is not None:
        trainer.max_iter = stop
    trainer.train()
    return trainer, recorder.random_states


def losses(trainer):
    names = [name for name in trainer.storage.histories() if "loss" in name]
    assert len(names) > 5
    return {name: trainer.storage.history(name).values() for name in names}


@pytest.fixture(scope="module")
def uninterrupted(shapes, tmp_path_factory):
    return run(shapes, tmp_path_factory.mktemp("uninterrupted"))


def test_a_memory_of_one_batch_trains_to_the_bit_the_same_with_and_without_it(shapes, tmp_path):
    # Then the memory does not take part in training: what differs is a side effect.
    runs = {}
    for on in (True, False):
        options = ["MODEL.MBN.MEMORY_SIZE", 1, "MODEL.MBN.DOUBLE_FORWARD", on]
        runs[on] = run(shapes, tmp_path / str(on), *options)
        hooks = [hook for hook in runs[on][0]._hooks if isinstance(hook, DoubleForwardHook)]
        assert len(hooks) == on
    (a, random_a), (b, random_b) = runs.values()
    assert len(random_a) == 12 and random_a == random_b
    assert losses(a) == losses(b)
    assert a.storage.histories().keys() == b.storage.histories().keys()
    assert_same_state(other_state(a.model), other_state(b.model))
    now, stale = memory_state(a.model), memory_state(b.model)
    assert sum(not torch.equal(now[key], stale[key]) for key in now) > 30


def test_every_scalar_is_in_the_event_storage_once_per_iteration(uninterrupted):
    trainer, _ = uninterrupted
    histories = trainer.storage.histories()
    assert {"total_loss", "loss_mask", "roi_head/num_fg_samples", "rpn/num_pos_anchors"} <= set(
        histories
    )
    for name, history in histories.items():
        iterations = [iteration for _, iteration in history.values()]
        assert len(iterations) == len(set(iterations)), name
        if name not in ("time", "eta_seconds"):
            assert len(iterations) == 12, name


def test_it_is_the_first_hook_and_the_trainer_installs_it_for_memories_alone(shapes, tmp_path):
    hooks = Trainer(cfg_for(shapes, tmp_path, *MODEL))._hooks
    assert isinstance(hooks[0], DoubleForwardHook)
    assert sum(isinstance(hook, DoubleForwardHook) for hook in hooks) == 1
    for options in (["MODEL.MBN.DOUBLE_FORWARD", False], [o.replace("MBN", "BRN") for o in MODEL]):
        hooks = Trainer(cfg_for(shapes, tmp_path, *MODEL, *options))._hooks
        assert not any(isinstance(hook, DoubleForwardHook) for hook in hooks)


def test_a_stopped_and_resumed_run_equals_one_that_was_not_stopped(shapes, uninterrupted, tmp_path):
    whole, random_whole = uninterrupted
    _, random_first = run(shapes, tmp_path, stop=6)
    resumed, random_last = run(shapes, tmp_path, resume=True)
    assert resumed.start_iter == 6
    assert random_first + random_last == random_whole
    assert_same_state(state(whole.model), state(resumed.model))
    for name, values in losses(resumed).items():
        assert values == losses(whole)[name][6:] and len(values) == 6


def test_the_checkpoint_contains_what_was_renewed(uninterrupted):
    trainer, _ = uninterrupted
    saved = torch.load(f"{trainer.cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)["model"]
    assert_same_state(state(trainer.model), saved)


def test_it_ends_with_the_training(uninterrupted):
    trainer, _ = uninterrupted
    assert not trainer.model._forward_pre_hooks


def test_training_with_detectron2s_mixed_precision_renews_under_the_same_autocast(monkeypatch):
    model = nn.Module()
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), MBN2d(4, **MBN)

        def forward(self, x):
            seen.append((torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()))
            return {"loss": self.norm(self.conv(x)).square().mean() * self.conv(x).abs().mean()}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # AMPTrainer insists on one
    monkeypatch.setattr(AMPTrainer, "_write_metrics", lambda *_, **__: None)
    batches = [batch(seed) for seed in range(7)]
    model = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer = AMPTrainer(model, batches, sgd(model), grad_scaler=scaler)
    trainer.register_hooks([DoubleForwardHook()])
    trainer.train(0, 6)
    assert seen == [(True, torch.float16)] * 12
    assert model.norm.memory.count == 6
    expected = model.conv(batches[5]).detach().mean((0, 2, 3))
    torch.testing.assert_close(entries(model.norm)[0][0], expected)


def test_the_trainer_renews_in_mixed_precision(shapes, tmp_path, monkeypatch):
    trainer = Trainer(cfg_for(shapes, tmp_path, *MODEL, "SOLVER.AMP.ENABLED", True))
    assert isinstance(trainer._trainer, AMPTrainer)
    # On the CPU its scaler is off, and so is autocast; what remains is the way through the code.
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.resume_or_load(resume=False)
    trainer._hooks = [hook for hook in trainer._hooks if type(hook).__name__ != "EvalHook"]
    trainer.max_iter = 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # AMPTrainer insists on one
    trainer.train()
    memories = memory_state(trainer.model)
    assert memories["backbone.bottom_up.stem.conv1.norm.memory.count"] == 2
    assert all(value.isfinite().all() for value in memories.values())
    assert trainer._trainer.grad_scaler.get_scale() == 4.0  # no step was skipped


@pytest.mark.slow
def test_two_workers_of_the_trainer_end_with_the_same_memories(shapes, tmp_path):
    results = run_workers(2, train_a_worker, tmp_path, shapes, tmp_path / "out", 2, *MODEL)
    (before0, after0, model0), (before1, after1, model1) = results
    assert any(not torch.equal(a, b) for a, b in zip(before0, before1))
    assert all(torch.equal(a, b) for a, b in zip(after0, after1))
    assert_same_state(model0, model1)
    assert model0["backbone.bottom_up.stem.conv1.norm.memory.count"] == 2
