"""A plan is data: it compares, hashes and travels as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from autocompress.channels import ChannelGroup, KeptChannels, Member
from autocompress.errors import ConfigError
from autocompress.plan import Plan, transform_from_dict, transform_to_dict
from autocompress.transforms import CP, SVD, SpatialSVD, TensorTrain, Transform, Tucker2

PLAN = Plan(
    {
        "layer1.0.conv1": SVD(12),
        "layer1.0.conv2": SpatialSVD(7),
        "layer2.0.conv1": Tucker2(8, 9),
        "layer2.0.conv2": CP(16),
        "layer3": TensorTrain((4, 5, 6)),
        "fc": TensorTrain((3,)),
    }
)


def test_json_round_trip_keeps_order_and_value() -> None:
    back = Plan.from_json(PLAN.to_json())
    assert back == PLAN and hash(back) == hash(PLAN)
    assert list(back.layers) == list(PLAN.layers)
    assert back.layers["layer3"] == TensorTrain((4, 5, 6))


def test_json_is_the_documented_one() -> None:
    data = json.loads(PLAN.to_json())
    assert data["version"] == 2
    assert data["layers"]["layer1.0.conv1"] == {"transform": "svd", "rank": 12}
    assert data["layers"]["fc"] == {"transform": "tt", "ranks": [3]}


GROUP = ChannelGroup(
    "conv1", 16, (Member("conv1", "out"), Member("bn1", "both"), Member("fc", "in", 32, 4)), 2
)
KEPT = KeptChannels(GROUP, (0, 1, 2, 5, 8, 9, 10, 15))


def test_channels_round_trip_with_all_that_is_needed_to_remove_them() -> None:
    plan = Plan({"fc": SVD(3)}, {"conv1": KEPT})
    assert Plan.from_json(plan.to_json()) == plan
    row = json.loads(plan.to_json())["channels"]["conv1"]
    assert (row["kept"], row["of"], row["chunks"]) == ("0-2,5,8-10,15", 16, 2)
    assert row["members"][2] == ["fc", "in", 32, 4]
    other = Plan({"fc": SVD(3)}, {"conv1": KeptChannels(GROUP, (0, 1, 2, 6, 8, 9, 10, 15))})
    assert len({plan.digest, other.digest, Plan({"fc": SVD(3)}).digest}) == 3


def test_a_plan_of_the_first_version_is_still_read() -> None:
    text = '{"version": 1, "layers": {"fc": {"transform": "svd", "rank": 3}}}'
    assert Plan.from_json(text) == Plan({"fc": SVD(3)})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kept": "0-x"}, "'conv1' of the plan can't be read"),
        ({"kept": "0-20"}, "from 0 to 15"),
        ({"kept": "0-2"}, "each of its 2 parts"),
        ({"members": None}, "can't be read"),
        ({"of": "many"}, "can't be read"),
    ],
)
def test_channels_that_are_none_are_refused(changed: dict[str, Any], words: str) -> None:
    data = json.loads(Plan({}, {"conv1": KEPT}).to_json())
    data["channels"]["conv1"] |= changed
    with pytest.raises(ConfigError, match=words):
        Plan.from_json(json.dumps(data))


def test_digest_knows_content_and_not_order() -> None:
    reverse = Plan(dict(reversed(PLAN.layers.items())))
    assert reverse.digest == PLAN.digest and reverse == PLAN and hash(reverse) == hash(PLAN)
    assert len(PLAN.digest) == 12 and int(PLAN.digest, 16) >= 0
    others = {Plan({"fc": SVD(rank)}).digest for rank in range(1, 20)}
    assert len(others | {PLAN.digest, Plan().digest, Plan({"fd": SVD(1)}).digest}) == 22


def test_the_digest_is_stable() -> None:
    """Studies on disk name plans by it: a change of this value breaks them."""
    assert Plan({"fc": SVD(12)}).digest == "2b49ab6f08ad"


def test_later_changes_of_the_given_dict_do_not_reach_the_plan() -> None:
    layers: dict[str, Transform] = {"fc": SVD(3)}
    plan = Plan(layers)
    layers["fc"] = SVD(4)
    assert plan.layers["fc"] == SVD(3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no plan"),
        ("[]", "no plan"),
        ('{"version": 1}', "no plan"),
        ('{"version": 1, "layers": [1]}', "no plan"),
        ('{"version": 3, "layers": {}}', "version 3, this package reads 1 and 2"),
        ('{"version": 1, "layers": {"fc": 3}}', "Layer 'fc'"),
        ('{"version": 1, "layers": {"fc": {"rank": 3}}}', "Unknown transform None"),
        (
            '{"version": 1, "layers": {"fc": {"transform": "tuker2", "rank": 3}}}',
            "Unknown transform 'tuker2'. Did you mean 'tucker2'? Known: cp, ",
        ),
        (
            '{"version": 1, "layers": {"fc": {"transform": "svd", "rnk": 3}}}',
            "'svd' has the fields ['rank'], got ['rnk']",
        ),
        ('{"version": 1, "layers": {"fc": {"transform": "svd"}}}', "got []"),
        ('{"version": 1, "layers": {"fc": {"transform": "svd", "rank": "3"}}}', "got '3'"),
        ('{"version": 1, "layers": {"fc": {"transform": "svd", "rank": 0}}}', "got 0"),
        ('{"version": 1, "layers": {"fc": {"transform": "svd", "rank": true}}}', "got True"),
        ('{"version": 1, "layers": {"fc": {"transform": "svd", "rank": [3]}}}', "got (3,)"),
        ('{"version": 1, "layers": {"fc": {"transform": "tt", "ranks": 3}}}', "got 3"),
        ('{"version": 1, "layers": {"fc": {"transform": "tt", "ranks": [3, -1]}}}', "got (3, -1)"),
    ],
)
def test_bad_plans_are_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Plan.from_json(text)
    assert words in str(error.value)


def test_dict_round_trip_of_a_transform() -> None:
    for transform in PLAN.layers.values():
        row = transform_to_dict(transform)
        assert transform_from_dict(json.loads(json.dumps(row))) == transform
