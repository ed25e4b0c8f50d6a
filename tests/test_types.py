"""The wire: every field of an unroll has bytes of its own, and a spec survives JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium import spaces

from asyncrl.spec_json import spec_from_json, spec_to_json
from asyncrl.types import Field, Layout, Spec, poison, space_fields, tree_leaves, tree_map

NESTED = spaces.Dict(
    [  # a list: in this order, not the alphabet's
        ("pixels", spaces.Box(0, 255, (7, 5, 3), np.uint8)),
        ("joints", spaces.Tuple([spaces.Box(-1, 1, (3,)), spaces.MultiBinary(5)])),
        ("clock", spaces.Discrete(4, start=-2)),
        ("empty", spaces.Box(0, 1, (0,))),
    ]
)
SPACES = [
    NESTED,
    spaces.Tuple([spaces.Discrete(2), spaces.Dict(inner=spaces.Box(0, 1, ()))]),
    spaces.Box(np.array([-np.inf, 0.1, -3]), np.array([2.5, np.inf, np.inf]), dtype=np.float64),
    spaces.Box(np.float32([[0.1, -7]]), np.float32([[0.1, 1e-30]])),
    spaces.Box(-np.inf, np.inf, (2, 2)),
    spaces.Box(-(2**63), 2**63 - 1, (), np.int64),
    spaces.Discrete(3, start=-1, dtype=np.int32),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiDiscrete([[3, 4], [5, 6]], dtype=np.int32, start=[[1, 2], [-3, 0]]),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
]
STATE = {"frames": Field((3, 7), "uint8"), "lstm": (Field((4,), "float32"), Field((), "int64"))}


def make_spec(observation_space: spaces.Space, **options) -> Spec:
    return Spec(6, 3, observation_space, spaces.MultiDiscrete([2, 9]), STATE, **options)


@pytest.mark.parametrize("space", [*SPACES[:2], spaces.Discrete(5)], ids=str)
def test_fields_are_aligned_apart_and_read_back_through_other_views(space):
    layout = make_spec(space, num_states=2).layout
    offset = 3 * layout.alignment
    buffer = np.zeros(offset + layout.nbytes, np.uint8)
    base = buffer.__array_interface__["data"][0]
    written = layout.views(buffer, offset)
    position = offset
    for array in tree_leaves(written):
        start = array.__array_interface__["data"][0] - base
        assert start % 64 == 0 and start >= position
        position = start + array.nbytes
    assert position <= len(buffer)

    rng = np.random.default_rng(0)
    private = tree_map(lambda x: rng.integers(0, 2**8, x.nbytes, np.uint8), written)
    # All is written before anything is read: fields that overlap would spoil each other.
    tree_map(
        lambda x, new: x.__setitem__(..., new.view(x.dtype).reshape(x.shape)), written, private
    )
    for array, new in zip(
        tree_leaves(layout.views(buffer, offset)), tree_leaves(private), strict=True
    ):
        assert np.array_equal(array.ravel().view(np.uint8), new)
    assert not buffer[:offset].any()


def test_shapes_are_time_major_with_one_row_more_to_bootstrap_from():
    unroll = make_spec(NESTED, num_states=2).layout.fields
    assert unroll.obs["pixels"] == Field((7, 3, 7, 5, 3), "uint8")
    assert unroll.obs["joints"][1] == Field((7, 3, 5), "int8")
    assert unroll.obs["clock"] == Field((7, 3), "int64")
    assert unroll.first == Field((7, 3), "bool")
    assert unroll.action == Field((6, 3, 2), "int64")
    assert unroll.valid == Field((6, 3), "bool")
    assert unroll.state["frames"] == Field((1, 3, 3, 7), "uint8")  # the others are in obs
    assert unroll.state["lstm"][1] == Field((2, 3), "int64")
    assert unroll.value == () and make_spec(NESTED, values=True).layout.fields.value.shape == (7, 3)
    # A cache line of flags, then 130 bytes in three lines.
    assert Layout((Field((1,), "bool"), Field((65,), "int16"))).nbytes == 64 + 192


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_spec_survives_json(space):
    for values in (False, True):
        spec = Spec(4, 2, space, spaces.Discrete(3), STATE, num_states=2, values=values)
        written = spec_to_json(spec)
        if not values:
            del written["values"]  # as older revisions did
        again = spec_from_json(json.loads(json.dumps(written)))
        assert again == spec
        assert str(again.layout) == str(spec.layout)  # as text, for the order of dict keys counts


def test_poison_is_what_no_environment_makes():
    spec = make_spec(NESTED)
    unroll = spec.layout.views(np.zeros(spec.layout.nbytes, np.uint8))
    poison(unroll)
    assert np.isnan(unroll.reward).all() and np.isnan(unroll.obs["joints"][0]).all()
    assert (unroll.obs["pixels"] == 255).all() and (unroll.action == 2**63 - 1).all()
    assert unroll.first.all() and unroll.valid.all() and (unroll.policy == 255).all()
    assert unroll.header.sequence == 2**63 - 1 and (unroll.episode_length == 2**31 - 1).all()


def test_refusals():
    with pytest.raises(ValueError, match="unroll_length=0 and num_envs=3"):
        Spec(0, 3, NESTED, NESTED, {})
    with pytest.raises(ValueError, match="unroll_length=4 and num_envs=0"):
        Spec(4, 0, NESTED, NESTED, {})
    for num_states in (0, 4):
        with pytest.raises(ValueError, match=f"divide unroll_length=6, got {num_states}"):
            make_spec(NESTED, num_states=num_states)
    text = spaces.Dict(words=spaces.Text(5))
    with pytest.raises(ValueError, match="MultiBinary, Dict or Tuple, got Text"):
        space_fields(text)
    with pytest.raises(ValueError, match="got Text"):
        spec_to_json(make_spec(text))
    with pytest.raises(ValueError, match="zip"):
        tree_map(lambda x, y: x, (1, 2), (1,))
