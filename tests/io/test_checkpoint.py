import json
import os

import pytest
import torch
import torch.nn.utils.prune

import nicefast as nf
from nicefast.io import tensorfile

safetensors = pytest.importorskip("safetensors", reason="needs safetensors")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def make(**options):
    model = nf.NICE((1, 2, 4), **{"hidden": (8,), "couplings": 3, **options})
    with torch.no_grad():
        model.scaling.log_scale.normal_()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"partition": "checkerboard", "prior": "normal", "activation": "gelu"},
        {"partition": nf.Partition.random(8, 3), "context": 2, "hidden": ()},
        {"hidden": ((8,), (4, 4), ()), "dropout": 0.0},
        {"partition": [nf.Partition.half(8), nf.Partition.random(8, 1), nf.Partition.random(8, 2)]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(tmp_path, options, dtype):
    model = make(**options).to(dtype)
    nf.save(model, tmp_path / "flow.safetensors")
    again = nf.load(tmp_path / "flow.safetensors")
    assert again.configuration == model.configuration
    assert [c.partition for c in again.couplings] == [c.partition for c in model.couplings]
    for (name, a), (other, b) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)
    x = torch.randn(3, 1, 2, 4)
    context = torch.randn(3, 2) if options.get("context") else None
    assert torch.equal(again.log_prob(x, context), model.log_prob(x, context))
    again.log_prob(x, context).sum().backward()
    assert all(p.requires_grad for p in again.parameters())
    assert os.listdir(tmp_path) == ["flow.safetensors"]


def test_what_is_loaded_is_set_to_evaluate(tmp_path):
    """Or a flow with dropout would give densities of a random sub-network."""
    model = make(dropout=0.5)
    nf.save(model, tmp_path / "flow.safetensors")
    again = nf.load(tmp_path / "flow.safetensors")
    x = torch.randn(3, 1, 2, 4)
    assert torch.equal(again.log_prob(x), model.eval().log_prob(x))


def test_metadata(tmp_path):
    path = tmp_path / "flow.safetensors"
    nf.save(make().double(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["nicefast_version"] == nf.__version__
    assert metadata["dtype"] == "float64"
    assert json.loads(metadata["configuration"])["features"] == [1, 2, 4]


def test_truncated_at_any_length(tmp_path):
    path = tmp_path / "flow.safetensors"
    nf.save(make(), path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"flow\.safetensors is truncated or no safetensors"):
            nf.load(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"no nicefast flow: .* None, expected 'nicefast"):
        nf.load(path)
    path.write_bytes(b"\x80\x04N." * 100)  # a pickle
    with pytest.raises(ValueError, match="no safetensors file"):
        nf.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        nf.load(tmp_path / "missing.safetensors")


def tampered(tmp_path, change_metadata=None, change_tensors=None):
    path = tmp_path / "flow.safetensors"
    model = make()
    nf.save(model, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    if change_metadata:
        configuration = json.loads(metadata["configuration"])
        change_metadata(configuration)
        metadata["configuration"] = json.dumps(configuration)
    if change_tensors:
        change_tensors(tensors)
    metadata["digest"] = tensorfile.digest(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(hidden=[9]),
        lambda c: c.update(hidden=[10**9] * 3),  # must not allocate
        lambda c: c.update(couplings=10**3),
        lambda c: c.update(prior="cauchy"),
        lambda c: c.update(prior=["logistic"]),
        lambda c: c.update(features="eight"),
        lambda c: c.update(surprise=1),
        lambda c: c.pop("features"),
        lambda c: c.update(partition=[[1, 1, 1, 1, 1, 1, 1, 1]] * 3),
        lambda c: c.update(partition=7),
        lambda c: c.update(features=[2**28]),
        lambda c: c.update(features=[1] * 10**6 + [8]),
        lambda c: c.update(features=8.0),
        lambda c: c.update(couplings=200_000),
        lambda c: c.update(couplings=True),
        lambda c: c.update(hidden=[1] * 100_000),
        lambda c: c.update(hidden=[[1] * 1000] * 3),
        lambda c: c.update(hidden=[0]),
        lambda c: c.update(context=2**40),
        lambda c: c.update(partition=[[1, 0] * 4] * 100_000),
    ],
)
def test_configuration_that_does_not_fit(tmp_path, change):
    with pytest.raises(ValueError, match="does not fit its own configuration"):
        nf.load(tampered(tmp_path, change_metadata=change))


def test_tensors_that_do_not_fit(tmp_path):
    for change in (
        lambda t: t.pop("scaling.log_scale"),
        lambda t: t.update(extra=torch.zeros(1)),
        lambda t: t.update({"scaling.log_scale": torch.zeros(8, dtype=torch.int32)}),
    ):
        with pytest.raises(ValueError, match="does not fit its own configuration"):
            nf.load(tampered(tmp_path, change_tensors=change))
    with pytest.raises(ValueError, match="log_scale that is not finite"):
        nf.load(
            tampered(tmp_path, change_tensors=lambda t: t["scaling.log_scale"].fill_(torch.nan))
        )


def test_every_changed_bit_is_noticed(tmp_path):
    """Or changes nothing: neither the density nor anything else that is loaded."""
    path = tmp_path / "flow.safetensors"
    model = nf.NICE(2, hidden=(2,), couplings=2, partition="random")
    nf.save(model, path)
    whole = path.read_bytes()
    x = torch.randn(3, 2)
    expected = model.log_prob(x)
    noticed = 0
    for bit in range(8 * len(whole)):
        if bit % 5:  # a fifth of them: another bit of each byte
            continue
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            again = nf.load(path)
        except ValueError as error:
            noticed += str(path) in str(error) and "\n" not in str(error)
            continue
        assert torch.equal(again.log_prob(x), expected), bit
        assert again.configuration == model.configuration
    assert noticed > len(whole) // 2


def test_the_digest_can_be_left_unread(tmp_path):
    path = tmp_path / "flow.safetensors"
    nf.save(make(), path)
    changed = bytearray(path.read_bytes())
    changed[-200] ^= 1  # of a weight; at the end are fingerprints
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"flow\.safetensors is damaged: .* digest"):
        nf.load(path)
    assert nf.load(path, verify=False).features == 8


def test_metadata_that_are_no_json_or_missing(tmp_path):
    path = tampered(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for change, says in (
        ({"configuration": "{"}, "does not fit its own configuration: 'configuration' is no JSON"),
        ({"configuration": "[" * 10**5}, "'configuration' is no JSON .maximum recursion"),
        ({"configuration": None}, "its own configuration: its metadata have no 'configuration'"),
        ({"configuration": "[]"}, "'configuration' is no JSON object"),
        ({"digest": None}, "its metadata have no 'digest'"),
    ):
        found = {k: v for k, v in (metadata | change).items() if v is not None}
        if "digest" not in change:
            found["digest"] = tensorfile.digest(tensors, found)
        save_file(tensors, path, metadata=found)
        with pytest.raises(ValueError, match=says) as error:
            nf.load(path)
        assert str(path) in str(error.value)


def baked_weight_norm(linear):
    torch.nn.utils.parametrizations.weight_norm(linear)
    torch.nn.utils.parametrize.remove_parametrizations(linear, "weight")


def baked_spectral_norm(linear):
    torch.nn.utils.parametrizations.spectral_norm(linear)
    torch.nn.utils.parametrize.remove_parametrizations(linear, "weight")


def baked_pruning(linear):
    torch.nn.utils.prune.random_unstructured(linear, "weight", 0.5)
    torch.nn.utils.prune.remove(linear, "weight")


@pytest.mark.parametrize("bake", [baked_weight_norm, baked_spectral_norm, baked_pruning])
def test_what_was_baked_into_weights_is_saved(tmp_path, bake):
    model = make()
    bake(model.couplings[0].conditioner.linears[0])
    nf.save(model, tmp_path / "flow.safetensors")
    x = torch.randn(3, 1, 2, 4)
    assert torch.equal(nf.load(tmp_path / "flow.safetensors").log_prob(x), model.log_prob(x))


@pytest.mark.parametrize("kind", ["conditioner", "linear", "weight"])
def test_what_is_shared_stays_shared(tmp_path, kind):
    model = make(partition="half", couplings=4)
    first, third = (model.couplings[i].conditioner for i in (0, 2))
    if kind == "conditioner":
        model.couplings[2].conditioner = first
    elif kind == "linear":
        third.linears[1] = first.linears[1]
    else:
        third.linears[0].weight = first.linears[0].weight
    nf.save(model, tmp_path / "flow.safetensors")
    again = nf.load(tmp_path / "flow.safetensors")
    x = torch.randn(3, 1, 2, 4)
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    first, third = (again.couplings[i].conditioner for i in (0, 2))
    assert (first is third) == (kind == "conditioner")
    assert (first.linears[1] is third.linears[1]) == (kind != "weight")
    assert (first.linears[0].weight is third.linears[0].weight) == (kind != "linear")


@pytest.mark.parametrize(
    "ties",
    [
        7,
        ["couplings.0"],
        [["couplings.0.conditioner", 1]],
        [["couplings.0.conditioner", "couplings.9.conditioner"]],
        [["couplings.0.__class__", "scaling.__class__"]],
        [["couplings.0.partition", "couplings.1.partition"]],
        [["couplings.0", "couplings.1"]],
        [["couplings", "couplings.0.conditioner.linears"]],  # a module within itself
        [["", "scaling"]],
        [["couplings.0.conditioner", "couplings.1.conditioner"]],  # other values
        [["couplings.0.conditioner", "couplings.2.conditioner"]] * 1000,
    ],
)
def test_ties_that_are_none_are_refused(tmp_path, ties):
    path = tampered(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"ties": json.dumps(ties)}
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"digest": tensorfile.digest(tensors, metadata)})
    with pytest.raises(ValueError, match="does not fit its own configuration") as error:
        nf.load(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_flow_without_values_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="model is on the meta device"):
        nf.save(make().to("meta"), tmp_path / "flow.safetensors")
    assert os.listdir(tmp_path) == []


def test_under_a_default_device_and_dtype(tmp_path):
    model = make(partition=[nf.Partition.random(8, i) for i in range(3)])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            nf.save(model, tmp_path / "flow.safetensors")
            again = nf.load(tmp_path / "flow.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(3, 1, 2, 4)
    assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        nf.save(make(), tmp_path / "flow.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "flow.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    import safetensors

    def full(tensors, target, metadata):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*flow\.safetensors") as error:
        nf.save(make(), tmp_path / "flow.safetensors")
    assert error.value.errno == 28
    assert os.listdir(tmp_path) == []


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = make()
    model.couplings[0].conditioner = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="its layers are not those of its configuration"):
        nf.save(model, tmp_path / "flow.safetensors")
    with pytest.raises(TypeError, match=r"model must be a nicefast\.NICE, got Linear"):
        nf.save(torch.nn.Linear(2, 2), tmp_path / "flow.safetensors")
    assert os.listdir(tmp_path) == []


def test_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "flow.safetensors"
    nf.save(make(), path)
    before = path.read_bytes()

    def interrupted(tensors, target, metadata):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nf.save(make(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["flow.safetensors"]


def test_tied_parameters(tmp_path):
    model = make(partition="half", couplings=2)
    model.couplings[1].conditioner.linears[0].weight = (
        model.couplings[0].conditioner.linears[0].weight
    )
    nf.save(model, tmp_path / "flow.safetensors")
    x = torch.randn(3, 1, 2, 4)
    assert torch.equal(nf.load(tmp_path / "flow.safetensors").log_prob(x), model.log_prob(x))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda path: nf.save(make(), None), TypeError, "path must be a path, got NoneType"),
        (lambda path: nf.load(1.5), TypeError, "path must be a path, got float"),
        (lambda path: nf.load(path, 1.5), TypeError, "device must be a device.*, got float"),
        (lambda path: nf.load(path, "a"), ValueError, "device must be a device.*, got 'a'"),
    ],
)
def test_paths_and_devices_of_a_wrong_kind_are_named(call, error, says, tmp_path):
    nf.save(make(), tmp_path / "flow.safetensors")
    with pytest.raises(error, match=says):
        call(tmp_path / "flow.safetensors")
    assert os.listdir(tmp_path) == ["flow.safetensors"]
