import pytest
import torch

from nicefast.runtime import ranks
from nicefast.runtime.ranks import Ranks


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 6, 100])
def test_shares_cover_all_rows_once_and_are_of_equal_size(world, count):
    shares = [range(count)[Ranks(rank, world).share(count)] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_without_a_process_group_there_is_one_rank():
    assert Ranks.here() == Ranks(0, 1)
    Ranks.here().wait()


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(ranks, "usable_device", torch.device)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    ranks.own_device("cuda")
    assert chosen == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("cpu", "cuda:0", "cuda"):
        ranks.own_device(name)
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"2 GPUs here.*--nproc-per-node must be at most 2"):
        ranks.own_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # it sees no other's
    assert ranks.own_device("cuda").type == "cuda"
    assert chosen == [1]
