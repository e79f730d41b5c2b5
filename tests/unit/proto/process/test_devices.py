"""What a planned device is called on a node whose Ray was given a part of the machine."""

import pytest

from megatoken.process.devices import visibility, visible_devices


@pytest.mark.parametrize(
    ("environ", "planned", "named"),
    [
        ({}, [2, 0], ["2", "0"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, [1], ["1"]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, [0, 3], ["4", "7"]),
        ({"HIP_VISIBLE_DEVICES": "6, 2"}, [1, 0], ["2", "6"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}, [1], ["GPU-bb"]),
        ({"CUDA_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "9"}, [0], ["3"]),
    ],
)
def test_a_planned_device_is_one_of_those_that_the_node_was_given(
    environ: dict[str, str], planned: list[int], named: list[str]
) -> None:
    assert visible_devices(environ, planned) == named
    assert set(visibility(environ, planned).values()) == {",".join(named)}


def test_a_device_that_the_node_was_not_given_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device 2 is not allowed: this node's Ray was given '4,5'"):
        visible_devices({"CUDA_VISIBLE_DEVICES": "4,5"}, [1, 2])


def test_amd_and_nvidia_are_told_the_same() -> None:
    assert visibility({}, [1, 3]) == {"CUDA_VISIBLE_DEVICES": "1,3", "HIP_VISIBLE_DEVICES": "1,3"}
