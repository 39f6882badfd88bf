"""The configuration: what it accepts, and errors that name the key, its value and the nearest right one."""

from pathlib import Path

import pytest
import yaml

from bkd_fast.app.cli import load
from bkd_fast.app.config import Config, ConfigError, Section

EXAMPLES = Path(__file__).parents[2] / "examples"


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_a_complete_run_on_digits():
    config = Config.build({})
    assert config.data.name == "digits"
    assert config.output == Path("runs/demo")


def test_a_file_and_its_overrides(tmp_path):
    path = write(tmp_path, "sampling: {lr: 1e-2, thin: 3}\nteacher: {model: {name: cnn, channels: [4], hidden: []}}\n")
    config = Config.load(path, ["sampling.thin=7", "student.model.hidden=[8, 8]", "data.train_size=null"])
    assert config.sampling.lr == 0.01  # YAML 1.1 reads 1e-2 as text
    assert config.sampling.thin == 7
    assert config.student.model.hidden == [8, 8]
    assert config.teacher.model.name == "cnn"
    assert config.data.train_size is None


def test_an_override_leaves_the_callers_mapping_alone():
    values = {"sampling": {"thin": 3}}
    assert Config.build(values, ["sampling.thin=9"]).sampling.thin == 9
    assert values == {"sampling": {"thin": 3}}


def test_a_dumped_configuration_loads_as_itself(tmp_path):
    model = {"name": "cnn", "channels": [3], "hidden": [5]}
    config = Config.build({"teacher": {"model": model}, "data": {"test_size": 5}})
    assert Config.load(write(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path):
    assert load(path, []).output.parts[0] == "runs"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sampling.num_drawss=1"], ["sampling", "'num_drawss'", "did you mean 'num_draws'"]),
        (["samplng.thin=1"], ["top level", "'samplng'", "did you mean 'sampling'"]),
        (["teacher.model.hiden=[3]"], ["teacher.model", "'hiden'", "did you mean 'hidden'"]),
        (["sampling.xyzzy=1"], ["'xyzzy'", "Known keys: lr, batch_size"]),
        (["sampling.lr=0"], ["sampling.lr = 0", "greater than 0"]),
        (["sampling.lr=fast"], ["sampling.lr = 'fast'", "valid number"]),
        (["sampling.lr=.nan"], ["sampling.lr = nan", "finite"]),
        (["sampling.thin=2.5"], ["sampling.thin = 2.5", "integer"]),
        (["sampling.num_draws=65536"], ["sampling.num_draws = 65536", "65535"]),
        (["posterior.level=1"], ["posterior.level = 1", "less than 1"]),
        (["data.name=imagenet"], ["data.name = 'imagenet'", "'digits' or 'mnist'"]),
        (["teacher.model.name=transformer"], ["teacher.model", "'mlp', 'cnn'"]),
        (["student.model.hidden=[0]"], ["hidden.0 = 0", "greater than 0"]),
        (["sampling=3"], ["sampling = 3"]),
        (["sampling.lr=0", "sampling.thin=0"], ["sampling.lr = 0", "sampling.thin = 0"]),
    ],
)
def test_a_wrong_key_or_value_is_named(overrides, parts):
    with pytest.raises(ConfigError) as raised:
        Config.build({}, overrides)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("override", ["thin", "=3", "sampling..thin=3", "seed.deep=1", "sampling.lr=[1"])
def test_a_malformed_override_is_named(override):
    with pytest.raises(ConfigError, match="--set"):
        Config.build({"seed": 3}, [override])


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "holds a list")])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        Config.load(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        Config.load(tmp_path / "nowhere.yaml")


def test_every_key_is_documented():
    def undocumented(section, prefix=""):
        for name, field in section.model_fields.items():
            blocks = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if is_block(kind)]
            for block in blocks:
                assert block.__doc__
                yield from undocumented(block, f"{prefix}{name}.")
            if not blocks and not field.description and name != "name":
                yield prefix + name

    def is_block(kind):
        return isinstance(kind, type) and issubclass(kind, Section)

    assert list(undocumented(Config)) == []
