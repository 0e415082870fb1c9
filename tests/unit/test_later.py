"""What was trained before there was a choice keeps its identity."""

from vipo.config.compose import load_config
from vipo.config.later import _BEFORE, without_later_choices

# Of the first release: a key that is added is either in `_BEFORE`, or CHANGELOG.md says that runs of before are others.
_GENERATOR = {
    *(
        "experts",
        "encoders",
        "encoder_batch",
        "family",
        "file",
        "frames",
        "guidance_scale",
        "guidance_scale_2",
        "height",
    ),
    *(
        "max_sequence_length",
        "negative_prompt",
        "path",
        "precision",
        "revision",
        "start",
        "start_scale",
        "weights",
        "width",
    ),
}


def test_choices_of_later_are_no_part_of_what_stays_as_it_was() -> None:
    config = load_config(["experiment=demo", "arm=vipo"])
    for identity in (config.training_identity(), config.sampling_identity(), config.evaluation_identity()):
        assert set(identity["generator"]) - {"device"} <= _GENERATOR
        for section, keys in _BEFORE.items():
            assert not keys.keys() & (identity.get(section) or {}).keys()
    changed = load_config(["experiment=demo", "arm=vipo", "generator.decoding=tiled"])
    assert changed.training_identity()["generator"]["decoding"] == "tiled"


def test_of_one_reward_its_advantage_is_that_of_the_sum() -> None:
    """The arm of Flow-GRPO adds rewards first, which it did not before there was a choice."""
    identities = [
        load_config(["experiment=demo", "arm=flow_grpo", *more]).training_identity()
        for more in ([], ["advantages.combine=advantages"])
    ]
    assert identities[0] == identities[1]
    weighted = load_config(["experiment=demo", "arm=flow_grpo", "reward.terms=[{name: redness, weight: 2}]"])
    assert weighted.training_identity()["advantages"]["combine"] == "rewards"


def test_a_section_may_lack_a_key_or_be_absent() -> None:
    assert without_later_choices({"generator": {"path": "a"}}) == {"generator": {"path": "a"}}
    assert without_later_choices({"seed": 1}) == {"seed": 1}
    assert without_later_choices({"generator": {"file_2": None, "file": "b"}}) == {"generator": {"file": "b"}}
