"""save and load: what comes back computes the same to the bit, and a file that asks for anything else is an error."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from networks import image, ready
from safetensors import safe_open
from safetensors.torch import save_file
from test_properties import models, output_of, randomise
from torch import Tensor, fx, nn

import elc_fx
from elc_fx.deploying import storing


def network() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return ready(nn.Sequential(block, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)))


X = image(2, 3, 8, 8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "small.elc"
    elc_fx.save(elc_fx.compile(network(), X), file)
    return file


def same(one: fx.GraphModule, other: fx.GraphModule, *inputs: Any) -> bool:
    with torch.no_grad():
        return torch.equal(one(*inputs), other(*inputs))


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(drawn=models(), seed=st.integers(0, 9), size=st.integers(1, 9), given_examples=st.booleans())
def test_what_is_loaded_computes_the_same_to_the_bit(
    drawn: tuple[nn.Module, int, int], seed: int, size: int, given_examples: bool, tmp_path_factory: Any
) -> None:
    model, dims, channels = drawn
    randomise(model, seed)
    x = torch.randn(2, channels, *[size + axis for axis in range(dims)], dtype=torch.float64)
    assume(output_of(model, x) is not None)
    compiled = elc_fx.compile(model, x if given_examples else None)
    file = tmp_path_factory.mktemp("saved") / "network"
    elc_fx.save(compiled, file)
    loaded = elc_fx.load(file)
    assert same(compiled, loaded, x.clone()) and loaded.code == compiled.code
    assert elc_fx.report_of(loaded) == elc_fx.report_of(compiled)
    assert list(loaded.state_dict()) == list(compiled.state_dict())


def test_a_merged_network_keeps_its_report_and_origins(tmp_path: Path) -> None:
    model, x = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))), X
    decoupled = elc_fx.decouple(model, elc_fx.Plan.of(model, x))
    elc_fx.set_gate(decoupled, 0)
    merged = elc_fx.merge(decoupled.eval())
    elc_fx.save(merged, tmp_path / "merged")
    loaded = elc_fx.load(tmp_path / "merged")
    assert same(merged, loaded, x) and elc_fx.report_of(loaded) == elc_fx.report_of(merged)
    assert storing.Report.from_dict(elc_fx.report_of(merged).to_dict()) == elc_fx.report_of(merged)
    origins = [storing_origin(m) for m in merged.modules()]
    assert any(origins) and origins == [storing_origin(m) for m in loaded.modules()]


def storing_origin(module: nn.Module) -> Any:
    return getattr(module, "elc_fx_origin", None)


def test_a_plan_and_its_prediction_come_back(tmp_path: Path) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    small = elc_fx.compile(model, X, mode="decouple", budget=elc_fx.Budget(depth=2), calibration=[X])
    elc_fx.save(small, tmp_path / "small")
    report = elc_fx.report_of(elc_fx.load(tmp_path / "small"))
    assert report.plan is not None and report.plan.candidates and report == elc_fx.report_of(small)


def test_what_a_loaded_network_can_still_do(file: Path, tmp_path: Path) -> None:
    loaded = elc_fx.load(file)
    elc_fx.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    assert same(elc_fx.compile(loaded, X), loaded, X)
    assert not loaded.training and not any(module.training for module in loaded.modules())
    torch.export.export(loaded, (X,))


def test_formats_ties_and_shared_layers_are_kept(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 3, padding=1)
            self.act = nn.PReLU()
            self.first, self.second = nn.Embedding(9, 4), nn.Embedding(9, 4)
            self.second.weight = self.first.weight
            self.scale = nn.Parameter(torch.rand(4, 1, 1), requires_grad=False)

        def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.act(self.act(self.a(x))) * torch.sigmoid(x * self.scale))
            return y, self.first(index) + self.second(index + 1)

    model = ready(Model()).to(memory_format=torch.channels_last)
    compiled = elc_fx.compile(model)
    elc_fx.save(compiled, tmp_path / "saved")
    loaded = elc_fx.load(tmp_path / "saved")
    assert loaded.a.weight.stride() == compiled.a.weight.stride() == model.a.weight.stride()
    assert loaded.first.weight is loaded.second.weight and not loaded.scale.requires_grad
    inputs = image(1, 4, 5, 5), torch.tensor([3])
    for one, other in zip(compiled(*inputs), loaded(*inputs), strict=True):
        assert torch.equal(one, other)


class Spelled(nn.Module):
    """Functions and attributes of torch that it does not list as overridable, or not by name."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu_(F.hardswish(x) + F.hardsigmoid(x), 0.1) + abs(x)
        x = torch.relu_(x).unflatten(1, (2, 2)).flatten(1, 2) + x.new_ones(x.size(0), 1, 1, 1)
        return x.max(dim=1).values + x.sort(dim=1).indices.sum(1) + x.data.stride(1)


def test_operators_of_torch_are_kept_however_they_are_spelled(tmp_path: Path) -> None:
    compiled = elc_fx.compile(ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Spelled())))
    elc_fx.save(compiled, tmp_path / "saved")
    assert same(elc_fx.load(tmp_path / "saved"), compiled, X)


# What cannot be saved.


class Own(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if float(x.sum()) > 0 else x


@fx.wrap
def own_function(x: Tensor) -> Tensor:
    return x * float(x.sum())


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return own_function(x)


def test_hooks_of_the_network_itself_are_told(tmp_path: Path) -> None:
    compiled = elc_fx.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval())
    compiled.register_forward_hook(lambda module, given, output: output * 0)
    with pytest.raises(elc_fx.StorageError, match="the network itself has hooks"):
        elc_fx.save(compiled, tmp_path / "saved")


def test_memory_formats_of_axes_of_one_are_kept(tmp_path: Path) -> None:
    layers = nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        model = nn.Sequential(*layers).to(memory_format=memory_format).eval()  # type: ignore[call-overload]
        compiled = elc_fx.compile(model)
        elc_fx.save(compiled, tmp_path / "saved")
        read = elc_fx.load(tmp_path / "saved")
        strides = [[parameter.stride() for parameter in network.parameters()] for network in (compiled, read)]
        assert strides[0] == strides[1]


def test_names_are_those_that_python_reads_in_code() -> None:
    """Full-width letters are others when they are looked up, and the same as plain ones in what torch.fx writes."""
    for name in ("\uff5a\uff5a", "named_\uff4dodules", "\ufb01rst"):
        with pytest.raises(storing._UnknownError, match="it has a name"):
            storing._path_part(name)
        with pytest.raises(storing._UnknownError, match="it has a name"):
            storing._identifier(name)
    assert storing._path_part("größe-1") == "größe-1"


def test_layers_may_have_hyphens_in_their_names_and_have_been_scripted(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict([("block1-0", nn.Conv2d(3, 3, 1)), ("of 1", nn.ReLU())])).eval()
    compiled, x = elc_fx.compile(model), torch.randn(1, 3, 4, 4)
    torch.jit.script(compiled)
    elc_fx.save(compiled, tmp_path / "saved")
    assert torch.equal(elc_fx.load(tmp_path / "saved")(x), compiled(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1), Own()), r"`1` is a test_storing.Own, whose code cannot be stored"),
        (Wrapped(), r"`own_function` calls test_storing.own_function, which is none of torch's operators that can be"),
        (Own(), "more than a graph of layers"),
    ],
)
def test_code_of_the_user_is_told_before_anything_is_written(model: nn.Module, message: str, tmp_path: Path) -> None:
    compiled = elc_fx.compile(model.eval())
    with pytest.raises(elc_fx.StorageError, match=message):
        elc_fx.save(compiled, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_names_are_told_and_others_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("my+layer", nn.Conv2d(3, 3, 1))
    with pytest.raises(elc_fx.StorageError, match=r"it has a name 'my\+layer'"):
        elc_fx.save(elc_fx.compile(model.eval()), tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    shared = nn.Conv2d(4, 4, 3, padding=1)  # merged with the layer before it, and called by its own name elsewhere
    compiled = elc_fx.compile(ready(nn.Sequential(shared, nn.BatchNorm2d(4), nn.ReLU(), shared)))
    assert any(name == "0_merged" for name, _ in compiled.named_modules())
    elc_fx.save(compiled, tmp_path / "saved")
    assert same(elc_fx.load(tmp_path / "saved"), compiled, image(1, 4, 5, 5))


def test_other_modules_are_told(tmp_path: Path) -> None:
    with pytest.raises(elc_fx.InvalidInputError, match="this Linear was not returned by"):
        elc_fx.save(nn.Linear(1, 1), tmp_path / "saved")


# Files that are damaged, or made by somebody else.


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(elc_fx.StorageError, match="there is no file"):
        elc_fx.load(tmp_path / "nothing")


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_or_truncated_file_is_told(data: st.DataObject, file: Path) -> None:
    content, damaged = bytearray(file.read_bytes()), file.with_name("damaged")
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    damaged.write_bytes(content)
    with pytest.raises(elc_fx.StorageError):
        elc_fx.load(damaged)


@pytest.mark.parametrize("kind", ["state dict", "pickle", "text"])
def test_another_file_is_told(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "other"
    if kind == "state dict":
        save_file({"weight": torch.zeros(1)}, file)
    elif kind == "pickle":
        torch.save(nn.Linear(1, 1), file)
    else:
        file.write_text("no network")
    with pytest.raises(elc_fx.StorageError, match="no network that elc_fx saved"):
        elc_fx.load(file)


def forged(file: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another description, and a digest that fits."""
    with safe_open(file, "pt") as stored:
        described = json.loads(stored.metadata()[storing.KEY])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    described.pop("digest")
    change(described)
    described["digest"] = storing._digest(described, tensors)
    save_file(tensors, file, {storing.KEY: json.dumps(described)})
    return file


def node(described: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for n in described["nodes"] if n["op"] == op)


def call(target: str, *args: Any) -> dict[str, Any]:
    return {"op": "call_function", "name": "evil", "target": target, "args": {"tuple": list(args)}, "kwargs": {}}


def layer(described: dict[str, Any]) -> dict[str, Any]:
    return next(iter(described["modules"].values()))


def inserted(described: dict[str, Any], *nodes: dict[str, Any]) -> None:
    """Behind the first call of a layer."""
    at = described["nodes"].index(node(described, "call_module")) + 1
    described["nodes"][at:at] = [{"args": {"tuple": []}, "kwargs": {}, **n} for n in nodes]


def through_a_layer(described: dict[str, Any]) -> None:
    """By attributes of a layer to Python's `eval`, which becomes its forward."""
    path = node(described, "call_module")["target"]
    inserted(
        described,
        {"op": "get_attr", "name": "b", "target": f"{path}.__init__.__builtins__"},
        {**call("operator.getitem", {"node": "b"}, "eval"), "name": "e"},
        {**call(f"{path}.__setattr__", "forward", {"node": "e"}), "name": "s", "op": "call_module"},
        {**call(path, "__import__('pathlib').Path('EVIL').touch()"), "op": "call_module"},
    )


def under_the_name_of(method: str) -> Callable[[dict[str, Any]], Any]:
    """A layer whose name is that of a method of the network, which would be called in its place."""

    def change(described: dict[str, Any]) -> None:
        described["modules"][method] = layer(described)
        inserted(described, {**call(method, "EVIL"), "op": "call_module"})

    return change


def imported(described: dict[str, Any]) -> None:
    """A storage's `type` imports what it is given the name of, and calls it."""
    x = {"node": described["nodes"][0]["name"]}
    inserted(
        described,
        {**call("untyped_storage", x), "name": "s", "op": "call_method"},
        {**call("type", {"node": "s"}, "test_storing.TypeOfStorage"), "op": "call_method"},
    )


class TypeOfStorage:
    is_sparse = False

    def __init__(self, _: int) -> None:
        Path("EVIL").touch()


EVIL = "x');__import__('os').system('touch EVIL');('"
ATTACKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "function": lambda d: d["nodes"].insert(1, call("os.system", "touch EVIL")),
    "torch.load": lambda d: d["nodes"].insert(1, call("torch.load", "EVIL")),
    "torch.ops": lambda d: d["nodes"].insert(1, call("torch.ops.load_library", "EVIL")),
    "eval": lambda d: d["nodes"].insert(1, call("builtins.eval", "1")),
    "getattr": lambda d: d["nodes"].insert(1, call("builtins.getattr", {"node": d["nodes"][0]["name"]}, "__class__")),
    "computed getattr": lambda d: d["nodes"].insert(1, call("builtins.getattr", "x", {"node": d["nodes"][0]["name"]})),
    "method": lambda d: d["nodes"].insert(1, {**call("apply_", {"node": d["nodes"][0]["name"]}), "op": "call_method"}),
    "dunder": lambda d: d["nodes"].insert(1, {**call("__reduce_ex__", "", 2), "op": "call_method"}),
    "input name": lambda d: node(d, "placeholder").update(target=EVIL),
    "node name": lambda d: node(d, "placeholder").update(name=EVIL),
    "module path": lambda d: node(d, "call_module").update(target=EVIL),
    "keyword": lambda d: node(d, "call_module").update(kwargs={"x=__import__('os')": 1}),
    "class name": lambda d: d.update(name="X:\n import os\nclass Y"),
    "class": lambda d: layer(d).update({"class": "GraphModule"}),
    "hooks": lambda d: layer(d)["plain"].update(_forward_hooks={"dict": []}),
    "forward": lambda d: layer(d)["plain"].update(forward="x"),
    "dtype": lambda d: d["nodes"].insert(1, call("torch.relu", {"dtype": "load"})),
    "through a layer": through_a_layer,
    "method of the graph": under_the_name_of("to_folder"),
    "method of a layer": under_the_name_of("0.__setattr__"),
    "import": imported,
    "report": lambda d: d["report"]["totals"].update(layers=["1", None]),
    "order": lambda d: next(iter(d["tensors"].values())).update(order=[0, 0]),
    "nested": lambda d: d["nodes"].insert(1, call("torch.relu", json.loads('{"list":[' * 210 + "1" + "]}" * 210))),
    "deep": lambda d: d["nodes"].insert(1, call("torch.relu", json.loads('{"list":[' * 400 + "1" + "]}" * 400))),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_file_runs_nothing(
    attack: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(elc_fx.StorageError):
        elc_fx.load(forged(file, ATTACKS[attack]))(X)
    assert not (tmp_path / "EVIL").exists()


def test_what_a_file_may_call_takes_tensors_and_no_code() -> None:
    for word in ("load", "save", "compile", "hub", "jit", "from_file", "exec", "eval", "import", "hook", "callable"):
        assert not [name for name in storing.functions() if word in name.rpartition(".")[2].split("_")], word
    assert not {"apply_", "map_", "storage", "untyped_storage"} & storing.methods()
    assert not [name for name in storing.methods() if name.startswith("_") or "hook" in name]


def test_a_file_of_a_later_format_is_told(file: Path) -> None:
    with pytest.raises(elc_fx.StorageError, match=r"format 99, this elc_fx reads 2: .*torch"):
        elc_fx.load(forged(file, lambda d: d.update(format=99)))


def test_buffers_are_in_the_state_dict_as_they_were(tmp_path: Path) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)
            self.register_buffer("mean", torch.ones(1, 3, 1, 1), persistent=False)
            self.register_buffer("scale", torch.full((1, 3, 1, 1), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer((x - self.mean) / self.scale)
            return y

    for model in (Centred(), nn.Sequential(Centred(), nn.ReLU())):
        before = elc_fx.compile(model.eval())
        elc_fx.save(before, tmp_path / "net.elc")
        after = elc_fx.load(tmp_path / "net.elc")
        assert list(after.state_dict()) == list(before.state_dict())
        assert dict(after.named_buffers()).keys() == dict(before.named_buffers()).keys()
        assert any(name.endswith("mean") for name, _ in after.named_buffers())


def test_a_network_in_training_mode_loads_in_eval_mode(tmp_path: Path) -> None:
    small = elc_fx.compile(ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))), X)
    elc_fx.save(small.train(), tmp_path / "n.elc")
    with torch.device("meta"):
        loaded = elc_fx.load(tmp_path / "n.elc")
    assert same(small.eval(), loaded, X) and not any(module.training for module in loaded.modules())


class Recurrent(nn.Module):
    """Layers that keep parameters in lists, and functions, among their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)
        self.lstm, self.gru = nn.LSTM(4, 6, num_layers=2, batch_first=True), nn.GRU(6, 4)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, activation="gelu", batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.lstm(self.norm(self.layer(x)).transpose(1, 2))[0])
        z: Tensor = self.gru(self.attention(y, y, y)[0])[0]
        return z


def test_recurrent_layers_and_attention(tmp_path: Path) -> None:
    small, x = elc_fx.compile(ready(Recurrent()), image(2, 3, 9)), image(2, 3, 9)
    elc_fx.save(small, tmp_path / "r.elc")
    loaded = elc_fx.load(tmp_path / "r.elc")
    assert same(small, loaded, x) and loaded.lstm._flat_weights[0] is loaded.lstm.weight_ih_l0
    assert list(loaded.state_dict()) == list(small.state_dict())


def test_what_is_loaded_in_inference_mode_trains(file: Path) -> None:
    with torch.inference_mode():
        small = elc_fx.load(file)
    small(X).sum().backward()


def test_links_in_a_circle_cannot_be_written(tmp_path: Path, file: Path) -> None:
    circle = [tmp_path / "a.elc", tmp_path / "b.elc"]
    for link, other in itertools.permutations(circle):
        link.symlink_to(other)
    with pytest.raises(elc_fx.StorageError, match=r"a\.elc"):
        elc_fx.save(elc_fx.load(file), circle[0])


def test_threads_may_write_one_file_and_links_and_permissions_stay(tmp_path: Path, file: Path) -> None:
    small, link = elc_fx.load(file), tmp_path / "link.elc"
    link.symlink_to(file)
    file.chmod(0o600)

    def write_and_read(_: int) -> bool:
        elc_fx.save(small, link)
        return same(small, elc_fx.load(link), X)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write_and_read, range(40)))
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.elc", "small.elc"]


def test_networks_that_make_tensors_are_stored(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.ones(4, 1, 1) * torch.arange(4.0).view(4, 1, 1) + torch.zeros(1)

    model, x = Model().eval(), torch.randn(2, 3, 6, 6)
    elc_fx.save(elc_fx.compile(model), tmp_path / "net.elc")
    torch.testing.assert_close(elc_fx.load(tmp_path / "net.elc")(x), model(x))
