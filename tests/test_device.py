"""The choice of a device, where no run covers it (tests/test_train.py)."""

import pytest

from megamm.common import device


@pytest.mark.parametrize(
    ("setting", "expected"), [(None, None), ("", []), ("0,2", ["0", "2"]), ("0, GPU-1a", ["0", "GPU-1a"])]
)
def test_visible_gpus_are_those_of_the_environment(monkeypatch, setting, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert device.visible() == expected
