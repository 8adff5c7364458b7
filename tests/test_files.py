"""nicefast.files: the whole of it under its name, or what was there before."""

import pytest

from nicefast.files import written


@pytest.mark.parametrize("name", ["flow.pt2", "set.tar.gz", "plain", ".hidden"])
def test_a_file_gets_its_name_when_it_is_whole(tmp_path, name):
    path = tmp_path / name
    path.write_text("before")
    with written(str(path)) as partial:
        assert partial.parent == tmp_path
        assert partial.name.endswith(path.suffix)
        assert partial.name.startswith(".")
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [True, False])
def test_after_an_error_all_is_as_it_was(tmp_path, error, begun):
    path = tmp_path / "flow.pt2"
    path.write_text("before")

    def interrupted():
        with written(path) as partial:
            if begun:
                partial.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written(tmp_path / "flow.pt2"):
        pass
    assert not list(tmp_path.iterdir())
