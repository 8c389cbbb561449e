"""Recipes: what is read, what is refused and in which words, and that a written recipe is read back equal."""

import subprocess
import sys
from pathlib import Path

import pytest

from pykd import config
from pykd.config import Config, ConfigError, Training

DIGITS = "noisy_teacher-digits"


@pytest.mark.parametrize("name", sorted(config.recipes()))
def test_packaged_recipes_are_whole(name, tmp_path):
    recipe = config.load(name)
    assert recipe.description
    assert "\n" not in recipe.description
    file = tmp_path / "again.yaml"
    file.write_text(recipe.to_yaml())
    assert config.load(str(file)) == recipe


@pytest.mark.parametrize(
    "word", ["no", "1e-3", "07", "1:30", "~", ".inf", "a: b", "é\n x", "", "2020-01-01", "<<", "true"]
)
def test_words_stay_words(word, tmp_path):
    recipe = config.load(DIGITS)
    recipe.description = word
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert config.load(str(file)) == recipe


def test_assignments_are_yaml():
    recipe = config.load(
        DIGITS,
        ["student.widths=[8, 4]", "student.training.lr=1e-2", "teacher.training.mixed_precision=no", "data.root="],
    )
    assert recipe.student.arguments == {"widths": [8, 4]}
    assert recipe.student.training.lr == 0.01
    assert recipe.teacher.training.mixed_precision == "no"
    assert recipe.data.root is None


def test_more_teachers_are_read_and_written_back(tmp_path):
    recipe = config.load(
        DIGITS, ["more_teachers=[{name: mlp, widths: [8], training: {epochs: 3}}, {name: lenet5, weights: a}]"]
    )
    assert list(recipe.teachers) == ["teacher", "teacher-2", "teacher-3"]
    assert recipe.teachers["teacher"] == recipe.teacher
    assert recipe.teachers["teacher-2"].arguments == {"widths": [8]}
    assert recipe.teachers["teacher-2"].training == Training(epochs=3)
    assert recipe.teachers["teacher-3"].weights == "a"
    file = tmp_path / "again.yaml"
    file.write_text(recipe.to_yaml())
    assert config.load(str(file)) == recipe
    assert list(config.load(DIGITS).teachers) == ["teacher"]


def test_a_grid_is_every_combination():
    combinations = config.grid(["method.sigma=0.1,0.5", 'data.root="a,b",c'])
    assert combinations[1] == ["method.sigma=0.1", 'data.root="c"']
    assert len({tuple(combination) for combination in combinations}) == 4
    assert config.load(DIGITS, combinations[0]).data.root == "a,b"
    assert config.grid([]) == [[]]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("student.training.epcohs=3", r"unknown key 'student\.training\.epcohs'; did you mean 'epochs'\?"),
        ("studnt.widths=[3]", r"unknown key 'studnt'; did you mean 'student'\?"),
        ("data.nam=mnist", r"unknown key 'data\.nam'; did you mean 'name'\?"),
        ("data.name=cifar", r"data\.name should be 'digits', .*'cifar100' or 'imagefolder', got 'cifar'"),
        ("student.training.optimizer=adm", r"'sgd', 'adam' or 'adamw', got 'adm'"),
        ("student.training.lr=.nan", r"student\.training\.lr should be a finite number, got nan"),
        ("student.training.lr=.inf", "finite number"),
        ("student.training.lr=-1", "greater than 0"),
        ("student.training.lr=fast", "valid number, got 'fast'"),
        ("student.training.epochs=0", "greater than or equal to 1"),
        ("student.training.epochs=1e3", "valid integer"),
        ("student.training.epochs=true", "valid integer"),
        (f"student.training.epochs={10**30}", "less than or equal to"),
        (f"seed={'9' * 5000}", "seed: not valid YAML: Exceeds the limit"),
        ("seed=-1", "greater than or equal to 0"),
        ("data.holdout=1", "less than 1"),
        ("data.holdout=0", "greater than 0"),
        ("method=3", r"method should be a mapping, got 3"),
        ("method={}", "method should have a name"),
        ("more_teachers=3", r"more_teachers should be a valid list, got 3"),
        ("more_teachers=[3]", r"more_teachers\.0 should be a mapping, got 3"),
        ("more_teachers=[{}]", r"more_teachers\.0\.name is missing"),
        (
            "more_teachers=[{name: mlp}, {name: mlp, training: {epcohs: 3}}]",
            r"unknown key 'more_teachers\.1\.training\.epcohs'; did you mean 'epochs'\?",
        ),
        ("student.training=3", r"student\.training should be a mapping"),
        ("student.weights=a.safetensors", "a student is always trained"),
        ("description.text=3", r"description has no keys of its own"),
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("a..b=3", "write key=value"),
        ("seed=[3", "not valid YAML in line 1"),
        ("seed={a: 1, a: 2}", "key 'a' occurs twice"),
        ("seed={1: 2}", "keys are words"),
        ("seed={[1]: 2}", "keys are words"),
        ("student.widths=&a [1, *a]", "aliases are not supported"),
        ("seed=!!python/object/apply:os.getcwd []", "tags are not supported"),
        ("seed=!!bool x", "tags are not supported"),
        ("seed=" + "[" * 5000, "nested too deeply"),
    ],
)
def test_wrong_assignments_say_what_is_right(assignment, words):
    with pytest.raises(ConfigError, match=words) as caught:
        config.load(DIGITS, [assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a recipe is a mapping"),
        (b"- a\n- b\n", "a recipe is a mapping"),
        (b"seed: 1\nseed: 2\n", "line 2: key 'seed' occurs twice"),
        (b"method: {name: x}\nteacher: {name: mlp}\n", "student is missing"),
        (b"\x7fELF\x00\x01\xff", "not valid YAML"),
        (b"a: [\n", "not valid YAML in line 2"),
        (b"x: " + b"a" * (1 << 20), "larger than a recipe can be"),
        (b"a: &a [x]\nb: *a\n", "aliases are not supported"),
    ],
)
def test_wrong_files_say_what_is_wrong(content, words, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        config.load(str(file))
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.yaml", "folder.yaml"])
def test_files_that_cannot_be_read(source, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: "):
        config.load(str(tmp_path / source))


@pytest.mark.parametrize("source", ["noisy_teacher-digit", "noisy-teacher_digits"])
def test_unknown_recipe_suggests_the_nearest(source):
    with pytest.raises(ConfigError, match="did you mean 'noisy_teacher-digits'"):
        config.load(source)


@pytest.mark.parametrize("source", ["", "/", "../recipes/noisy_teacher-digits", "x\x00"])
def test_a_recipe_is_a_name_not_a_path(source):
    with pytest.raises(ConfigError, match="unknown recipe"):
        config.load(source)


def test_construct_names_the_argument():
    def network(*, in_shape: int, widths: list[int]) -> list[int]:
        if len(widths) > 2:
            raise ValueError("too many widths")
        return [in_shape, *widths]

    assert config.construct(network, {"widths": [2]}, "student", in_shape=1) == [1, 2]
    with pytest.raises(ConfigError, match=r"unknown key 'student\.width'; did you mean 'widths'\?"):
        config.construct(network, {"width": [2]}, "student", in_shape=1)
    with pytest.raises(ConfigError, match=r"unknown key 'student\.in_shape'"):
        config.construct(network, {"in_shape": 3}, "student", in_shape=1)
    with pytest.raises(ConfigError, match="student: too many widths"):
        config.construct(network, {"widths": [1, 2, 3]}, "student", in_shape=1)
    with pytest.raises(ConfigError, match=r"student: .*widths"):
        config.construct(network, {}, "student", in_shape=1)


def test_defaults_are_checked_and_equal_the_documented_ones():
    assert Training() == Training(epochs=10, batch_size=128, optimizer="adam", lr=1e-3, schedule="cosine")
    assert Config.model_json_schema()["additionalProperties"] is False


def test_recipes_need_no_torch():
    code = "import sys; from pykd import config; config.load('noisy_teacher-mnist'); print('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
