"""Ray Data scores the rows of a cluster as the flow itself does, also when a worker is killed."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import nicefast as nf
from nicefast.preprocessing import Preprocessing

ray = pytest.importorskip("ray", reason="needs ray")
pytest.importorskip("ray.data", reason="needs ray[data]")

from nicefast.scoring.ray import Worker, _files, _runs, score_dataset  # noqa: E402


def flow(features=6):
    torch.manual_seed(0)
    return nf.NICE(features, hidden=(16,), couplings=3)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # other tests would leave its workers no time
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False
        )
        yield
        ray.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes as Linux names them")
def test_rows_are_scored_beside_their_columns_though_a_worker_is_killed(cluster):
    rows = np.random.default_rng(0).normal(size=(4000, 6)).astype(np.float32)
    table = {f"x{i}": rows[:, i] for i in range(6)} | {"id": np.arange(4000)}
    dataset = ray.data.from_items([{k: v[i] for k, v in table.items()} for i in range(4000)])
    model = flow()
    scored = score_dataset(
        model, dataset, columns=[f"x{i}" for i in range(6)], batch_rows=20, workers=2
    )
    killed, found = False, []
    for batch in scored.iter_batches(batch_size=200, batch_format="numpy"):
        found.append(batch)
        if not killed:
            killed = _kill_one()
        time.sleep(0.02)
    assert killed
    ids = np.concatenate([batch["id"] for batch in found])
    order = np.argsort(ids)
    assert np.array_equal(ids[order], np.arange(4000))
    log_prob = np.concatenate([batch["log_prob"] for batch in found])[order]
    with torch.no_grad():
        expected = model.log_prob(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(log_prob, expected, atol=1e-4)
    assert set(found[0]) == {*table, "log_prob"}


def _kill_one():
    """Ray gives a process the name of the task it is at."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            if path.read_bytes().startswith(b"ray::MapWorker"):
                os.kill(int(path.parent.name), signal.SIGKILL)
                return True
    return False


def test_a_worker_gives_integers_the_noise_of_their_row_numbers():
    levels = torch.randint(0, 17, (50, 6), generator=torch.Generator().manual_seed(0))
    levels = levels.to(torch.uint8)
    steps = Preprocessing.fit(["dequantise"], levels, 17)
    model = flow()
    x, log_det = steps.forward(levels, 3)
    with torch.no_grad():
        expected = (model.log_prob(x) + log_det).numpy()
    worker = Worker(
        _files(model, steps), None, "n", False, outputs=("log_prob", "z"), seed=3, draws=1,
        reference=None,
    )  # fmt: skip
    order = np.array([*range(20, 50), 3, 4, 0])
    got = worker({"x": levels.numpy()[order], "n": order})
    np.testing.assert_allclose(got["log_prob"], expected[order], atol=1e-4)
    assert got["z"].shape == (33, 6)
    assert list(_runs(order, 33)) == [(0, 30), (30, 32), (32, 33)]
    assert list(_runs(np.zeros(0), 5)) == [(0, 5)]


def test_what_is_wrong_is_said_before_rows_are_scored():
    with pytest.raises(TypeError, match=r"must be a nicefast\.NICE or a path, got _With"):
        score_dataset(_WithLogProb(), None)
    with pytest.raises(ValueError, match="outputs must be among"):
        score_dataset(flow(), None, outputs=("density",))
    steps = Preprocessing.fit(["dequantise"], torch.zeros(2, 6, dtype=torch.uint8), 17)
    with pytest.raises(ValueError, match="row must name the column that numbers the rows"):
        score_dataset(flow(), None, preprocessing=steps)
    worker = Worker(
        _files(flow(), None), None, None, False, outputs=("log_prob",), seed=0, draws=1,
        reference=None,
    )  # fmt: skip
    for batch, says in (
        ({"x": np.zeros((3, 5))}, "must have 6 features, as the model does, got 5: x"),
        ({"x": np.array(["a"])}, "columns x must be numbers"),
    ):
        with pytest.raises(ValueError, match=says):
            worker(batch)
    worker.columns = ["y"]
    with pytest.raises(ValueError, match="column 'y' is missing; there are x"):
        worker({"x": np.zeros((3, 6))})


class _WithLogProb(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def log_prob(self, x):
        return x
