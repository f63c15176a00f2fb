"""Checkpoints from strangers: nothing in them runs, whatever the file's name, and all honest ones load."""

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from torch import nn

from mabn_d2.checkpoint import Checkpointer, last_checkpoint, read_checkpoint
from mabn_d2.checkpoint.reading import TRUST

from .helpers import INSTANT, ROOT

# ---------------------------------------------------------------------------- files that run code


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


class WritesAFile(nn.Module):
    """Writes a file when `torch.jit.load` meets it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.path)

    def forward(self, x):
        return x


def torchscript(path, trace):
    torch.jit.script(WritesAFile(str(trace))).save(str(path))


def torchscript_behind_something(path, trace):
    """A zip archive is found from its end."""
    torchscript(path, trace)
    path.write_bytes(b"something" + path.read_bytes())


def legacy_tar(path, trace):
    """Of before torch 0.2: pickles in a tar, which are extracted, into a folder outside with this one."""
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
        for name in ("storages", "tensors", "pickle", f"../../{trace.name}"):
            content = pickle.dumps(0 if name != "pickle" else Malicious(trace))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def zip_of_torch_save(path, trace):
    torch.save({"model": {"weight": Malicious(trace)}}, path)


def stream_of_torch_save(path, trace):
    torch.save({"model": Malicious(trace)}, path, _use_new_zipfile_serialization=False)


def pickle_of(path, trace):
    path.write_bytes(pickle.dumps({"model": {"weight": Malicious(trace)}, "__author__": "me"}))


def pickle_of_python_2(path, trace):
    path.write_bytes(pickle.dumps({"model": Malicious(trace)}, protocol=0))


def tensor_within_a_pickle(path, trace):
    """`torch.storage._load_from_bytes` calls torch.load for what is within."""
    inner = io.BytesIO()
    torch.save(Malicious(trace), inner)

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    path.write_bytes(pickle.dumps({"model": Storage()}))


MALICIOUS = [
    torchscript, torchscript_behind_something, legacy_tar, zip_of_torch_save, stream_of_torch_save,
    pickle_of, pickle_of_python_2, tensor_within_a_pickle,
]  # fmt: skip


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "model.pyth", "model.bin"])
@pytest.mark.parametrize("write", MALICIOUS)
@pytest.mark.parametrize("how", ["weights", "resume"])
def test_a_file_that_runs_code_is_refused_in_one_line_and_nothing_is_written(
    how, write, name, tmp_path
):
    path, trace = tmp_path / name, tmp_path / "executed"
    write(path, trace)
    (tmp_path / "last_checkpoint").write_text(name)
    before = sorted(os.listdir(tmp_path))
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    with pytest.raises(ValueError) as error:
        if how == "resume":
            checkpointer.resume_or_load("", resume=True)
        else:
            checkpointer.load(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("write", [torchscript, zip_of_torch_save, pickle_of])
def test_the_malicious_files_do_run_where_nobody_is_careful(write, tmp_path):
    path, trace = tmp_path / "model", tmp_path / "executed"
    write(path, trace)
    if write is pickle_of:
        pickle.loads(path.read_bytes())
    elif write is torchscript:
        torch.jit.load(str(path))
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()


def test_what_is_not_on_the_list_is_named_with_the_option_that_trusts_the_file(
    tmp_path, monkeypatch
):
    path, trace = tmp_path / "model.pth", tmp_path / "executed"
    zip_of_torch_save(path, trace)
    with pytest.raises(ValueError, match=rf"it contains \w+\.mkdir\..* set {TRUST}=1"):
        read_checkpoint(str(path))
    monkeypatch.setenv(TRUST, "1")
    for write in (zip_of_torch_save, stream_of_torch_save, pickle_of):
        write(path, trace)
        assert set(read_checkpoint(str(path))) >= {"model"} and trace.exists()
        trace.rmdir()
    torchscript(path, trace)  # is no checkpoint, trusted or not
    with pytest.raises(ValueError, match="TorchScript"):
        read_checkpoint(str(path))
    assert not trace.exists()


def test_a_pickle_cannot_change_the_functions_that_it_may_call(tmp_path):
    # The global collections.Counter, and BUILD with a state for its attributes.
    content = b"ccollections\nCounter\n(N}Vupdate\nI1\nstb."
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="it changes a function"):
        read_checkpoint(str(tmp_path / "model.pkl"))
    assert callable(collections.Counter.update)


def test_bytes_cannot_pass_for_pointers(tmp_path):
    """A numpy type that says of itself that it holds no objects, for an array of them: a crash."""

    class Type:
        def __reduce__(self):
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)

    class Array:
        def __reduce__(self):
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), Type(), False, b"\x41" * 8)

    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": Array()}, protocol=2))
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_checkpoint(str(tmp_path / "model.pkl"))


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path):
    class Larger:
        def __reduce__(self):
            storage = torch.zeros(2).storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1000,), (1,), False, {})

    for modern in (True, False):
        path = tmp_path / "model.pth"
        torch.save({"model": Larger()}, path, _use_new_zipfile_serialization=modern)
        with pytest.raises(ValueError, match="model.pth is no checkpoint"):
            read_checkpoint(str(path))


@pytest.mark.parametrize(
    "name", ["../stranger.pth", "/tmp/stranger.pth", "folder/stranger.pth", "..", "", "http://a/b"]
)
def test_a_last_checkpoint_cannot_point_outside_of_its_folder(name, tmp_path):
    output = tmp_path / "output"
    (output / "folder").mkdir(parents=True)
    for file in (tmp_path / "stranger.pth", output / "folder" / "stranger.pth"):
        torch.save({"model": {}}, file)
    (output / "last_checkpoint").write_text(name)
    for ask in (
        lambda: last_checkpoint(str(output)),
        lambda: Checkpointer(nn.Linear(1, 1), str(output)).resume_or_load("", resume=True),
    ):
        with pytest.raises(ValueError, match="last_checkpoint names .* accepted is the name") as e:
            ask()
        assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------ files that are none

NO_CHECKPOINTS = {
    "empty": (b"", "it is empty"),
    "a web page": (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
    "a web page of pickle's letters": (b"<html>", "it is a web page"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "damaged or of another format"),
    "zeros": (b"\0" * 600, "damaged or of another format"),
    "a zip without anything": (b"PK\x05\x06" + bytes(18), "not one of torch.save"),
}


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "model.pyth"])
@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_with_the_reason(case, name, tmp_path):
    content, reason = NO_CHECKPOINTS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("modern", [True, False])
def test_a_file_cut_off_anywhere_is_refused(modern, tmp_path):
    torch.save({"model": {"a": torch.rand(100)}}, tmp_path / "whole.pth",
               _use_new_zipfile_serialization=modern)  # fmt: skip
    content = (tmp_path / "whole.pth").read_bytes()
    for length in range(1, len(content) - 1, max(1, len(content) // 40)):
        (tmp_path / "part.pth").write_bytes(content[:length])
        with pytest.raises(ValueError, match="part.pth is no checkpoint"):
            read_checkpoint(str(tmp_path / "part.pth"))


def test_a_folder_and_a_missing_file_are_refused_in_one_line(tmp_path):
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "no.pth", "does not exist")):
        with pytest.raises((ValueError, OSError), match=reason) as error:
            Checkpointer(nn.Linear(1, 1)).load(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["<html>", "a folder", "code", "resume code"])
def test_the_command_line_refuses_weights_in_one_line_before_anything_starts(content, tmp_path):
    weights, output = tmp_path / "weights.pth", tmp_path / "output"
    if content == "a folder":
        weights.mkdir()
    elif content == "<html>":
        weights.write_text(content)
    options = ["MODEL.WEIGHTS", str(weights)]
    if content == "code":
        zip_of_torch_save(weights, tmp_path / "executed")
    if content == "resume code":
        output.mkdir()
        zip_of_torch_save(output / "model_0000003.pth", tmp_path / "executed")
        (output / "last_checkpoint").write_text("model_0000003.pth")
        options = ["--resume"]
    before = sorted(map(str, tmp_path.rglob("*")))
    flags = [o for o in options if o[0] == "-"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(INSTANT), *flags,
         "OUTPUT_DIR", str(output), *[o for o in options if o not in flags]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = [l for l in done.stdout.splitlines() if "arn" not in l and "pkg_resources" not in l]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("train_net.py: error:")
    assert sorted(map(str, tmp_path.rglob("*"))) == before


# ------------------------------------------------------------------------------- files that load


def everything():
    whole = torch.rand(6, 4)
    model = collections.OrderedDict(
        whole=whole, part=whole[1:3], transposed=whole.t(), steps=whole.view(-1)[::2],
        half=whole.half(), bfloat=whole.bfloat16(), double=whole.double(), integers=torch.arange(3),
        scalar=torch.tensor(7), empty=torch.empty(0, 3), truth=whole > 0.5, byte=(whole * 9).byte(),
    )  # fmt: skip
    model._metadata = {"": {"version": 1}}
    return {
        "model": model,
        "trainer": {"iteration": 5, "hooks": [None, True, 1.5, "text", (1, 2), b"bytes", 10**30]},
        "milestones": collections.Counter([3, 3, 5]), "size": torch.Size([1, 2]), "names": {"a"},
        "dtype": torch.float32, "device": torch.device("cpu"), "metric": np.float64(3),
        "array": np.arange(4.0), "parameter": nn.Parameter(torch.ones(2)),
    }  # fmt: skip


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    elif isinstance(a, np.ndarray):
        assert type(a) is np.ndarray and np.array_equal(a, b) and a.dtype == b.dtype
    elif isinstance(a, dict):
        assert type(a) is type(b) and list(a) == list(b)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b and type(a) is type(b)


@pytest.mark.parametrize("modern", [True, False])
def test_what_torch_save_wrote_is_read_as_torch_load_reads_it(modern, tmp_path):
    path = tmp_path / "model.any"
    torch.save(everything(), path, _use_new_zipfile_serialization=modern)
    read = read_checkpoint(str(path))
    assert_equal(read, torch.load(path, weights_only=False))
    read["model"]["whole"][1] = 7  # as in the file, views share memory
    assert (read["model"]["part"][0] == 7).all()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_with_numpy_arrays_of_every_protocol_are_read(protocol, tmp_path):
    arrays = {
        "float": np.random.rand(3, 4).astype("f4"), "fortran": np.asfortranarray(np.random.rand(3, 4)),
        "big endian": np.arange(3, dtype=">i4"), "objects": np.array(["a", 1], dtype=object),
        "text": np.array(["ab", "c"]), "empty": np.zeros((0, 3)),
    }  # fmt: skip
    content = {"model": arrays, "__author__": "me", "scalar": np.float32(2)}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert_equal(read_checkpoint(str(path)), pickle.loads(path.read_bytes()))


def test_the_pickle_of_python_2_with_numpy_arrays_is_read(tmp_path):
    # As Detectron's files are: cPickle of protocol 2, in which text and the arrays' bytes are strings.
    values = struct.pack("<2f", 1.5, -2.0)

    def text(value):
        return b"U" + bytes([len(value)]) + value

    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"f4")
        + b"K\x00K\x01tR(K\x03"
        + text(b"<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
        b"(K\x01K\x02\x85" + dtype + b"\x89" + text(values) + b"tb"
    )
    (tmp_path / "R-50.pkl").write_bytes(b"\x80\x02}" + text(b"conv1_w") + array + b"s.")
    read = read_checkpoint(str(tmp_path / "R-50.pkl"))
    assert read["conv1_w"].tolist() == [1.5, -2.0] and read["conv1_w"].dtype == np.float32


@pytest.mark.parametrize("scheduler", ["MultiStepLR", "CosineAnnealingLR"])
def test_a_whole_training_checkpoint_is_read(scheduler, tmp_path):
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    arguments = {"MultiStepLR": ([2, 3],), "CosineAnnealingLR": (5,)}
    schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, *arguments[scheduler])
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    saved = Checkpointer(model, str(tmp_path), optimizer=optimizer, scheduler=schedule)
    saved.save("model_0000001", iteration=1, best=np.float64(0.3))
    other = nn.Linear(3, 3)
    optimizer2 = torch.optim.AdamW(other.parameters(), lr=0.5)
    schedule2 = getattr(torch.optim.lr_scheduler, scheduler)(optimizer2, *arguments[scheduler])
    rest = Checkpointer(
        other, str(tmp_path), optimizer=optimizer2, scheduler=schedule2
    ).resume_or_load("")
    assert rest == {"iteration": 1, "best": 0.3}
    assert torch.equal(model.weight, other.weight)
    assert_equal(optimizer2.state_dict()["state"][0], optimizer.state_dict()["state"][0])
    assert schedule2.state_dict()["last_epoch"] == schedule.state_dict()["last_epoch"]


def test_detectron2s_layouts_load(tmp_path):
    weight = torch.rand(2, 2)
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": nn.Linear(2, 2, bias=False)})})
    ours, short = "backbone.stem.weight", "stem.weight"
    array = weight.numpy()
    files = {
        "bare.pth": {ours: weight}, "model.pth": {"model": {ours: weight}, "iteration": 3},
        "parallel.pth": {"model": {f"module.{ours}": weight}},
        "short.pth?matching_heuristics=True": {short: weight},
        "zoo.pkl": {"model": {short: array}, "__author__": "me", "matching_heuristics": True},
        "pycls.pyth": {"model_state": {short: weight, "stem.num_batches_tracked": torch.ones(1)}},
    }  # fmt: skip
    for name, content in files.items():
        path = tmp_path / name.split("?")[0]
        if name.endswith(".pkl"):
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        nn.init.zeros_(model["backbone"]["stem"].weight)
        Checkpointer(model).load(str(tmp_path / name))
        assert torch.equal(model["backbone"]["stem"].weight, weight), name
    with pytest.raises(ValueError, match="the option no_such behind the name"):
        Checkpointer(model).load(str(tmp_path / "bare.pth?no_such=1"))
