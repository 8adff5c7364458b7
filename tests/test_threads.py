"""Shares of a batch in threads: PyTorch's own, or a pool's."""

import multiprocessing
import re
import threading
import time

import pytest
import torch

from nicefast import threads


@pytest.fixture(params=["team", "pool"], autouse=True)
def kind(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(threads, "_parallel", lambda: None)
    elif threads._parallel() is None:
        pytest.skip("no OpenMP library here that PyTorch runs in")
    return request.param


@pytest.fixture(params=[2, 3])
def two_or_more(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_share_once_and_in_order(two_or_more, count):
    done = []
    for _ in range(20):
        got = threads.share_out(lambda s: done.append(s) or 10 * s, range(count))
        assert got == [10 * s for s in range(count)]
    assert sorted(done) == sorted([*range(count)] * 20)


def test_the_allocator_keeps_blocks_whoever_computes():
    threads._settle_allocator.cache_clear()
    threads.share_out(lambda s: s, range(2))
    assert threads._settle_allocator.cache_info().currsize == 1


def test_shares_are_computed_at_once(two_or_more):
    """Each waits for the others to begin."""
    begun = threading.Barrier(two_or_more)
    threads.share_out(lambda _: begun.wait(60), range(two_or_more))


def test_a_team_is_that_of_pytorch_s_own_operations(kind, two_or_more):
    """Threads of a pool are others than the caller."""
    begun, caller = threading.Barrier(two_or_more), threading.get_ident()

    def own(_):
        begun.wait(60)
        return threading.get_ident()

    found = threads.share_out(own, range(two_or_more))
    assert len(set(found)) == two_or_more
    assert (caller in found) == (kind == "team")


def test_neither_gradients_nor_autocast_nor_more_threads(two_or_more):
    x = torch.ones(2, requires_grad=True)
    begun = threading.Barrier(two_or_more)

    def state(_):
        begun.wait(60)
        return (x * 2).requires_grad, torch.is_autocast_enabled("cpu"), threads.count()

    assert threads.count() == two_or_more
    with torch.autocast("cpu", torch.bfloat16):
        assert set(threads.share_out(state, range(two_or_more))) == {(False, False, 1)}
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert threads.count() == two_or_more == torch.get_num_threads()


def test_each_computes_alone(kind, two_or_more):
    """A thread that had more than its share would keep another from computing."""
    begun = threading.Barrier(two_or_more)

    def own(_):
        begun.wait(60)
        torch.randn(300, 300) @ torch.randn(300, 300)  # what a thread asks for by itself
        if kind == "team":  # where operations start no threads
            return bool(threads._library().omp_in_parallel())
        numbers = re.findall(
            r"(?:omp|mkl)_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info()
        )
        return {str(torch.get_num_threads()), *numbers} == {"1"}

    assert all(threads.share_out(own, range(two_or_more)))
    assert torch.get_num_threads() == two_or_more


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_is_the_caller_s(two_or_more, inference):
    with torch.inference_mode(inference):
        made = threads.share_out(lambda _: torch.ones(1), range(4))
    assert [t.is_inference() for t in made] == [inference] * 4


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, SystemExit])
def test_an_error_is_the_caller_s_when_all_have_ended(two_or_more, error, capfd):
    done = []

    def work(share):
        if share == 0:
            raise error("share 0")
        time.sleep(0.01)
        done.append(share)

    with pytest.raises(error, match="share 0"):
        threads.share_out(work, range(4))
    assert sorted(done) == [1, 2, 3]
    begun = threading.Barrier(two_or_more)

    def all_fail(share):
        begun.wait(60)
        time.sleep(0.01 * (two_or_more - share))
        raise error(f"share {share}")

    with pytest.raises(error, match="share 0"):
        threads.share_out(all_fail, range(two_or_more))
    assert threads.share_out(lambda s: s, range(4)) == [0, 1, 2, 3]
    assert capfd.readouterr().err == ""


def test_many_callers_at_once(two_or_more):
    def call(i):
        for _ in range(20):
            found[i] += threads.share_out(lambda s: s + i, range(5))

    found = [[] for _ in range(4)]
    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert found == [[i + s for s in range(5)] * 20 for i in range(4)]


def _in_a_child(queue):
    queue.put(
        threads.share_out(
            lambda s: float((torch.ones(64, 64) @ torch.ones(64)).sum()) + s, range(3)
        )
    )


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking with threads
def test_a_forked_child_has_threads_of_its_own(two_or_more):
    """OpenMP's don't survive a fork, and it would wait for them forever."""
    threads.share_out(lambda s: s, range(3))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == [4096.0, 4097.0, 4098.0]
        child.join(60)
    finally:
        child.kill()


def test_more_threads_than_python_keeps_busy_are_a_pool_of_few(kind):
    """Each of these computes with several."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 * threads.MOST)
        assert threads.count() == threads.MOST
        caller = threading.get_ident()
        found = threads.share_out(lambda _: threading.get_ident(), range(threads.MOST))
        assert caller not in found
        assert torch.get_num_threads() == 2 * threads.MOST
    finally:
        torch.set_num_threads(before)
