import pytest

from nicefast.ranks import Ranks


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
