"""configs/README.md lists every field of every config class, with its type and default."""

import pytest

from tests.helpers.config_table import config_classes, rows, table, written


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_table_of_a_class(cls):
    found = {name: row[:2] for name, row in written().get(cls.__name__, {}).items()}
    wanted = rows(cls)
    missing = [row for name, row in zip(wanted, table(cls), strict=True) if name not in found]
    assert not missing, "add to configs/README.md:\n" + "\n".join(missing)
    assert found == wanted


def test_no_class_that_is_gone():
    assert set(written()) == {cls.__name__ for cls in config_classes()}
