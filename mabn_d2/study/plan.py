"""A study's plan: grids of training runs in one YAML file."""

import difflib
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .weights_as import FORMS

_Node = Mapping[str, Any]


class Tool(NamedTuple):
    """How a command line of `tools/` is told what all of them need to be told."""

    file: str
    lr: str
    seed: str
    images: str
    norm_batch: str
    virtual_workers: str  # "" if it has none
    output: str
    weights: str
    weights_import: str
    metrics: tuple[str, ...]  # columns of the results, the first one decides

    def options(self, options: _Node) -> list[str]:
        """The options at the end of the command line."""
        if self.file.endswith("lazyconfig_train_net.py"):
            return [f"{key}={_text(value)}" for key, value in options.items()]
        return [text for key, value in options.items() for text in (key, _text(value))]


TOOLS = {
    "train_net": Tool(
        "tools/train_net.py", "SOLVER.BASE_LR", "SEED", "SOLVER.IMS_PER_BATCH", "MODEL.NORM_BATCH_SIZE",
        "SOLVER.VIRTUAL_WORKERS", "OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.WEIGHTS_IMPORT", ("box_ap", "mask_ap"),
    ),
    "lazyconfig_train_net": Tool(
        "tools/lazyconfig_train_net.py", "optimizer.lr", "train.seed", "dataloader.train.total_batch_size",
        "model.norm_batch_size", "", "train.output_dir", "train.init_checkpoint", "train.weights_import",
        ("top1_error",),
    ),
}  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)  # which both kinds of config read as such
    return value if isinstance(value, str) else json.dumps(value) if value != () else "()"


@dataclass(frozen=True)
class Run:
    """One training run. Its learning rate may follow from other runs."""

    id: str  # "BLOCK/LEVEL-PROTOCOL-NORM-sSEED"
    block: str
    task: str
    level: str  # "" where the block has none
    protocol: str
    norm: str
    lr: float | None  # None for the config's own, or for the best of `lr_block`
    seed: int
    tool: Tool = field(repr=False)
    config: str
    imports: tuple[str, ...]
    options: _Node = field(repr=False)
    images: int
    workers: int  # processes
    virtual_workers: int  # of each process
    norm_batch: int  # images that a norm takes its statistics from
    slots: int  # how many of the --jobs it counts as
    lr_block: str = ""  # "best of" this block
    lr_norm: str = ""  # ... for this norm
    weights: str = ""  # id of a run or, with `weights_file`, a file
    weights_file: bool = False
    weights_as: str = ""  # the form of `weights_as.py` that they get first

    def arguments(self, lr: float | None) -> list[str]:
        """Of the tool, without output folder and weights: what tells one training from another."""
        options = dict(self.options)
        if lr is not None:
            options[self.tool.lr] = lr
        options[self.tool.seed] = self.seed
        imports = [text for name in self.imports for text in ("--import", name)]
        workers = ["--num-gpus", str(self.workers)] if self.workers > 1 else []
        return [
            *imports, *workers, "--config-file", self.config, *self.tool.options(options)
        ]  # fmt: skip

    @property
    def start(self) -> str:
        """Where training starts, as the results record it."""
        return ", ".join(filter(None, [self.weights, self.weights_as]))

    def command(self, lr: float | None) -> str:
        """As the results record it."""
        return shlex.join([self.tool.file, *self.arguments(lr)])


@dataclass(frozen=True)
class Block:
    name: str
    title: str
    tool: Tool
    runs: tuple[Run, ...]
    differences: tuple[tuple[str, str], ...]  # of norms


@dataclass(frozen=True)
class Plan:
    file: Path
    output: Path
    results: Path
    curves: Path
    document: Path
    images: Path
    blocks: tuple[Block, ...]
    norms: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """In the order in which they are run."""
        return [run for block in self.blocks for run in block.runs]

    def block(self, name: str) -> Block:
        """
        Raises:
            ValueError: there is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise ValueError(f"{self.file} has no block {name!r}{_hint(name, self.blocks_names)}")

    @property
    def blocks_names(self) -> list[str]:
        return [block.name for block in self.blocks]


def load_plan(file: str | Path) -> Plan:
    """
    Reads a plan. configs/study/README.md says what is in one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plan; the message names the key.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"The plan {str(file)!r} does not exist")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    try:
        return _plan(file, content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


_TABLES = ("tasks", "norms", "levels", "protocols", "blocks")
_KEYS = {
    "tasks": {"tool", "config", "norm", "options", "import"},
    "norms": {
        "norm", "options", "import", "config", "lr_of", "one_process", "scratch", "weights", "weights_as",
    },
    "levels": {"options"},
    "protocols": {"images", "workers", "virtual_workers", "norm_batch", "slots", "options"},
    "blocks": {
        "title", "task", "norms", "levels", "protocols", "lr", "seeds", "options", "weights", "differences",
    },
}  # fmt: skip
_NEEDED = {
    "tasks": {"tool", "config", "norm"},
    "protocols": {"images"},
    "blocks": {"task", "norms", "protocols", "seeds"},
}


def _plan(file: Path, content: Any) -> Plan:
    paths = {
        "output": f"output/{file.stem}",
        "results": f"docs/results/{file.stem}.csv",
        "document": f"docs/{file.stem}.md",
        "images": "docs/images",
    }
    _check("the plan", content, {*_TABLES, *paths}, {"tasks", "norms", "protocols", "blocks"})
    tables = {name: content.get(name, {}) for name in _TABLES}
    for kind, entries in tables.items():
        _check(kind, entries)
        for name, entry in entries.items():
            _check(f"{kind}.{name}", entry or {}, _KEYS[kind], _NEEDED.get(kind, set()))
            _check(f"{kind}.{name}.options", (entry or {}).get("options") or {})
    for name, task in tables["tasks"].items():
        _look_up(task["tool"], TOOLS, f"tasks.{name}.tool")
    for name, protocol in tables["protocols"].items():
        least = {"images": 1, "workers": 1, "virtual_workers": 1, "slots": 1, "norm_batch": 0}
        for key in least.keys() & protocol:
            value = protocol[key]
            if type(value) is not int or value < least[key]:
                raise ValueError(
                    f"protocols.{name}.{key} must be an integer of at least {least[key]}, got {value!r}"
                )
    blocks: list[Block] = []
    for name in tables["blocks"]:
        blocks.append(_block(name, tables, blocks))
    values = {key: Path(content.get(key, default)) for key, default in paths.items()}
    curves = values["results"].with_name(f"{values['results'].stem}_curves.csv")
    return Plan(
        file, **values, curves=curves, blocks=tuple(blocks), norms=tuple(tables["norms"])
    )  # fmt: skip


def _block(name: str, tables: Mapping[str, _Node], earlier: Sequence[Block]) -> Block:
    where = f"blocks.{name}"
    if not re.fullmatch(r"[\w.-]+", str(name)):
        raise ValueError(f"{where}: a block's name has letters, digits and -_. only")
    node = tables["blocks"][name]
    task_name = _look_up(node["task"], tables["tasks"], f"{where}.task")
    tool = TOOLS[tables["tasks"][task_name]["tool"]]
    norms = _names(node["norms"], tables["norms"], f"{where}.norms")
    levels = _names(node.get("levels", []), tables["levels"], f"{where}.levels") or [""]
    protocols = _names(node["protocols"], tables["protocols"], f"{where}.protocols")
    lrs, lr_block = _learning_rates(node.get("lr"), f"{where}.lr", earlier)
    seeds = _list(node["seeds"], int, f"{where}.seeds")
    runs = []
    for protocol, level, seed, lr, norm in itertools.product(protocols, levels, seeds, lrs, norms):
        what = {"task": task_name, "level": level, "protocol": protocol, "norm": norm}
        run = _run(name, what, lr, seed, lr_block, tables, tool)
        if lr_block and not candidates(lr_block, run):
            raise ValueError(
                f"{where}.lr: block {lr_block.name} has no runs of {run.lr_norm} with protocol {protocol}"
            )
        runs.append(run)
    ids = [run.id for run in runs]
    if repeated := {id_ for id_ in ids if ids.count(id_) > 1}:
        raise ValueError(f"{where}: several runs would have the id {min(repeated)}")
    known = {run.id for block in earlier for run in block.runs}
    for run in runs:
        if run.weights and not run.weights_file and run.weights not in known:
            raise ValueError(
                f"{where}: {run.id} starts from weights of a run, but no block before has the run "
                f"{run.weights}{_hint(run.weights, known)}"
            )
    differences: list[tuple[str, str]] = []
    for pair in node.get("differences", []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{where}.differences: {pair!r} is not a pair of norms")
        a, b = _names(pair, dict.fromkeys(norms), f"{where}.differences")
        differences.append((a, b))
    return Block(name, str(node.get("title", name)), tool, tuple(runs), tuple(differences))


def _run(
    block: str, what: dict[str, str], lr: float | None, seed: int, lr_block: Block | None,
    tables: Mapping[str, _Node], tool: Tool,
) -> Run:  # fmt: skip
    nodes = {
        kind: tables[f"{kind}s"][name] or {} if name else {}
        for kind, name in {**what, "block": block}.items()
    }
    task, norm, protocol = nodes["task"], nodes["norm"], nodes["protocol"]
    own = "weights" in norm
    where = f"norms.{what['norm']}.weights" if own else f"blocks.{block}.weights"
    weights = (norm if own else nodes["block"]).get("weights") or {}
    _check(where, weights, {"run", "file", "import"})
    if weights and ("run" in weights) == ("file" in weights):
        raise ValueError(f"{where} must have either run or file, got {', '.join(weights)}")
    if norm.get("scratch"):
        weights = {}
    if "weights_as" in norm:
        _look_up(norm["weights_as"], FORMS, f"norms.{what['norm']}.weights_as")
    workers, virtual_workers = (
        1 if norm.get("one_process") else protocol.get(key, 1) for key in ("workers", "virtual_workers")
    )  # fmt: skip
    options: dict[str, Any] = {}
    layer = norm.get("norm", what["norm"])
    if layer is not None:
        options |= dict.fromkeys(_list(task["norm"], str, "norm"), layer)
    options[tool.images] = protocol["images"]
    if "norm_batch" in protocol and not norm.get("one_process"):
        options[tool.norm_batch] = protocol["norm_batch"]
    if virtual_workers > 1:
        if not tool.virtual_workers:
            raise ValueError(f"protocols.{what['protocol']}.virtual_workers: {tool.file} has none")
        options[tool.virtual_workers] = virtual_workers
    if "import" in weights:
        options[tool.weights_import] = weights["import"]
    for kind in ("task", "protocol", "level", "norm", "block"):
        options |= nodes[kind].get("options") or {}
    rate = "" if lr is None else f"-lr{lr:g}"
    parts = filter(None, [what["level"], what["protocol"], what["norm"]])
    start = str(weights.get("run") or weights.get("file") or "")
    return Run(
        id=f"{block}/{re.sub(r'[^()+=.A-Za-z0-9_-]', '_', '-'.join(parts))}{rate}-s{seed}",
        block=block, lr=lr, seed=seed, tool=tool, **what,
        config=norm.get("config", task["config"]),
        imports=(*_list(task.get("import", []), str, "import"), *_list(norm.get("import", []), str, "import")),
        options=options, images=protocol["images"], workers=workers, virtual_workers=virtual_workers,
        norm_batch=options.get(tool.norm_batch) or protocol["images"] // (workers * virtual_workers),
        slots=1 if workers == 1 else protocol.get("slots", workers),
        lr_block=lr_block.name if lr_block else "", lr_norm=norm.get("lr_of", what["norm"]),
        weights=start.replace("{seed}", str(seed)), weights_file="file" in weights,
        weights_as=norm.get("weights_as", "") if weights else "",
    )  # fmt: skip


def _learning_rates(
    value: Any, where: str, earlier: Sequence[Block]
) -> tuple[list[float | None], Block | None]:
    match = re.fullmatch(r"best of (\S+)", value) if isinstance(value, str) else None
    if match:
        name = _look_up(match[1], {block.name: block for block in earlier}, where)
        return [None], next(block for block in earlier if block.name == name)
    return ([None] if value is None else list(_list(value, float, where))), None


def candidates(block: Block, run: Run) -> list[Run]:
    """The runs of a block of several learning rates among which the best one for a run is chosen."""
    return [
        other for other in block.runs
        if (other.norm, other.protocol) == (run.lr_norm, run.protocol) and other.lr is not None
    ]  # fmt: skip


# ---- checks --------------------------------------------------------------------------------------


def _check(where: str, node: Any, known: set | None = None, needed: set = frozenset()) -> None:  # type: ignore[assignment]
    if not isinstance(node, dict):
        raise ValueError(f"{where} must be a group of keys, got {node!r}")
    for key in node if known else ():
        _look_up(key, known or (), where)
    for key in sorted(needed - set(node)):
        raise ValueError(f"{where} lacks {key}")


def _look_up(name: Any, table: Any, where: str) -> str:
    if name not in table:
        raise ValueError(
            f"{where}: no {name!r}{_hint(name, table)}; there are {', '.join(sorted(map(str, table)))}"
        )
    return name


def _hint(name: Any, names: Any) -> str:
    similar = difflib.get_close_matches(str(name), list(map(str, names)), 1)
    return f" (similar is {similar[0]})" if similar else ""


def _names(value: Any, table: _Node, where: str) -> list[str]:
    return [_look_up(name, table, where) for name in _list(value, str, where)]


def _list(value: Any, kind: type, where: str) -> list:
    values = value if isinstance(value, list) else [value]
    try:
        return [kind(v) for v in values]
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be of {kind.__name__}, got {value!r}") from None
