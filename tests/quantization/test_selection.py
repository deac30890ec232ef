"""Which groups a budget keeps."""

import pytest

from msquant.errors import RecipeError
from msquant.kernels.layer_report import GroupError
from msquant.quantization.selection import Budget, RankedGroup, select
from msquant.schemes import W8A8


def group(
    name: str, matrices: int, error: float, size: int | None = 100, dynamic: float | None = None
) -> RankedGroup:
    linears = tuple(f"{name}.{i}" for i in range(matrices))
    return RankedGroup(GroupError(0, name, linears, W8A8, error, dynamic), 0.0, size)


GROUPS = [
    group("qkv", 3, 6.0, 300),
    group("down", 1, 4.0, 500),
    group("gate_up", 2, 5.0, 900),
    group("o", 1, 0.5),
]


def names(kept: list[RankedGroup]) -> list[str]:
    return [group.measured.group for group in kept]


@pytest.mark.parametrize(
    ("count", "kept"),
    [
        (1, ["down"]),
        (2, ["down", "o"]),
        (3, ["down", "gate_up"]),
        (4, ["down", "gate_up", "o"]),
        (6, ["down", "gate_up", "qkv"]),
        (7, ["down", "gate_up", "qkv", "o"]),
    ],
)
def test_the_most_error_for_a_matrix_is_kept_and_no_group_is_split(count: int, kept: list[str]) -> None:
    assert names(select(GROUPS, Budget("keep_float", count), 0)) == kept


def test_a_size_buys_the_most_error_for_a_byte() -> None:
    assert names(select(GROUPS, Budget("max_size", 1500), 1000)) == ["qkv", "o"]
    assert names(select(GROUPS, Budget("max_size", 1800), 1000)) == ["qkv", "down"]
    assert select(GROUPS, Budget("max_size", 1000), 1000) == []


def test_as_few_as_needed_bring_the_error_down() -> None:
    assert names(select(GROUPS, Budget("max_error", 11.6), 0)) == ["down"]
    assert names(select(GROUPS, Budget("max_error", 6.6), 0)) == ["down", "gate_up"]
    assert select(GROUPS, Budget("max_error", 15.5), 0) == []
    assert len(select(GROUPS, Budget("max_error", 0), 0)) == 4


def test_what_a_later_choice_makes_superfluous_is_let_go() -> None:
    groups = [group("o", 1, 3.0), group("qkv", 3, 7.0)]
    assert names(select(groups, Budget("max_error", 4.0), 0)) == ["qkv"]


def test_what_is_not_served_in_floating_point_is_never_kept() -> None:
    groups = [group("feed_forward", 27, 9.0, None), group("o", 1, 1.0)]
    for budget in (Budget("keep_float", 28), Budget("max_size", 10**6), Budget("max_error", 9.0)):
        assert names(select(groups, budget, 0)) == ["o"]
    with pytest.raises(RecipeError, match=r"--max-error: 9 is left") as caught:
        select(groups, Budget("max_error", 8.0), 0)
    assert caught.value.remedy == "give more than 9"


def test_a_scale_per_token_is_given_where_it_takes_most_away() -> None:
    groups = [
        group("down", 1, 4.0, dynamic=3.9),
        group("o", 1, 1.0, dynamic=0.1),
        group("qkv", 3, 2.0, dynamic=2.5),
        group("gate_up", 2, 5.0, dynamic=None),
    ]
    assert names(select(groups, Budget("keep_dynamic", 1), 0)) == ["o"]
    assert names(select(groups, Budget("keep_dynamic", 7), 0)) == ["o", "down"]
