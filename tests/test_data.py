"""nicefast.data: fixed splits, dequantisation, and files that are refused."""

import numpy as np
import pytest
import torch

from nicefast.data import DATASETS, dequantise, load_data, split_rows


@pytest.fixture(autouse=True, scope="module")
def _scikit_learn():
    pytest.importorskip("sklearn", reason="needs scikit-learn")


def test_digits_are_the_1797_images_with_17_levels():
    data = load_data("digits")
    assert (data.levels, data.event_shape, data.features) == (17, (1, 8, 8), 64)
    rows = torch.cat([data.train, data.validation, data.test])
    assert rows.shape == (1797, 1, 8, 8)
    assert rows.dtype == torch.uint8
    assert (rows.min(), rows.max()) == (0, 16)


@pytest.mark.parametrize("count", [20, 21, 99, 1797])
def test_split_is_disjoint_complete_and_fixed(count):
    parts = split_rows(count)
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert min(len(part) for part in parts) >= 2
    torch.manual_seed(1234)  # the split must not follow the global seed
    np.random.seed(1234)
    assert all(torch.equal(a, b) for a, b in zip(parts, split_rows(count), strict=True))


def test_split_never_changes():
    train, validation, test = split_rows(1797)
    assert (len(train), len(validation), len(test)) == (1258, 180, 359)
    assert train[:5].tolist() == [1081, 1707, 927, 713, 262]
    assert test[:5].tolist() == [455, 584, 147, 160, 1111]


def test_split_needs_rows():
    with pytest.raises(ValueError, match=r"at least 20 rows.*got 19"):
        split_rows(19)


@pytest.mark.parametrize("k", [2, 17, 256, 65536])
def test_dequantised_levels_lie_in_their_own_cells_below_one(k):
    levels = torch.randint(k, (200, 50), generator=torch.Generator().manual_seed(0))
    levels[0] = k - 1
    x = dequantise(levels, k, torch.Generator().manual_seed(1))
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() < 1
    noise = x.double() * k - levels
    # float32 has 24 bits; what the levels do not use is left for the noise.
    assert noise.min() >= -k * 2.0**-24
    assert noise.max() <= 1 + k * 2.0**-24
    assert abs(noise.mean().item() - 0.5) < 0.02


def test_dequantise_stays_below_one_where_float32_rounds_up(monkeypatch):
    largest = torch.tensor([[1 - 2**-24]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: largest)
    assert dequantise(torch.tensor([[255]]), 256).item() < 1


def test_dequantise_follows_its_generator():
    levels = torch.zeros(10, 3, dtype=torch.uint8)
    one, two, other = (
        dequantise(levels, 4, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_dequantise_refuses_what_are_not_levels():
    with pytest.raises(TypeError, match="float32"):
        dequantise(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match=r"0 \.\. 3, got values from 0 to 4"):
        dequantise(torch.tensor([[0, 4]]), 4)


def test_floats_stay_as_they_are(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 3))
    np.save(tmp_path / "table.npy", values)
    data = load_data(tmp_path / "table.npy")
    assert (data.name, data.levels, data.event_shape) == ("table", None, (3,))
    train, _, test = split_rows(50)
    assert torch.equal(data.train, torch.from_numpy(values)[train].float())
    assert torch.equal(data.test, torch.from_numpy(values)[test].float())


@pytest.mark.parametrize(
    ("dtype", "top", "kept"),
    [("u1", 255, torch.uint8), (">i4", 300, torch.int32), ("bool", 1, torch.uint8)],
)
def test_integers_are_levels(tmp_path, dtype, top, kept):
    values = np.random.default_rng(0).integers(0, top + 1, size=(40, 2, 2))
    values[0] = top
    np.save(tmp_path / "levels.npy", values.astype(dtype))
    data = load_data(str(tmp_path / "levels.npy"))
    assert (data.levels, data.event_shape, data.train.dtype) == (top + 1, (2, 2), kept)
    assert torch.equal(data.train.long(), torch.from_numpy(values)[split_rows(40)[0]])


BAD = {
    "text": (np.array([["a", "b"]] * 30), "dtype"),
    "complex": (np.ones((30, 2), complex), "dtype"),
    "nan": (np.full((30, 2), np.nan), "not finite"),
    "too_large": (np.full((30, 2), 1e300), "not finite in float32"),
    "one_dimension": (np.ones(30), r"\(30,\)"),
    "few_rows": (np.ones((19, 2)), r"at least 20 rows.*\(19, 2\)"),
    "one_feature": (np.ones((30, 1)), "2 features"),
    "negative": (np.full((30, 2), -1), "from -1"),
    "one_level": (np.zeros((30, 2), int), "levels"),
    "many_levels": (np.full((30, 2), 2**40), "levels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_named(tmp_path, name):
    array, reason = BAD[name]
    np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(ValueError, match=f"{name}.npy: .*{reason}"):
        load_data(tmp_path / f"{name}.npy")


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "file.npy"
    with pytest.raises(ValueError, match=r"file\.npy: no such file"):
        load_data(path)

    np.save(path, np.ones((100, 4)))
    whole = path.read_bytes()
    for content in (b"", b"x" * 500, whole[:5], whole[:60], whole[:-8], whole[:128]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.npy: not a readable"):
            load_data(path)

    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"folder\.npy: not a readable"):
        load_data(tmp_path / "folder.npy")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickles_and_archives_are_never_opened(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([[Trap()] * 2] * 30), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", np.ones((30, 2)))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for name in ("objects.npy", "archive.npy"):
        with pytest.raises(ValueError, match=f"{name}: not a readable"):
            load_data(tmp_path / name)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of digits.*\.npy file, got 'mnits'"):
        load_data("mnits")


def test_a_data_set_is_added_by_a_function(monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", lambda: (torch.zeros(20, 3, dtype=torch.uint8), 2))
    assert load_data("mine").levels == 2
