"""Recipes: the options of a run, read from YAML, checked, and written back.

Nothing is imported or instantiated from a file. This module needs no torch, so that a mistyped recipe is told at once.
"""

import difflib
import inspect
import itertools
import json
import re
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from pykd.errors import PykdError

T = TypeVar("T")
Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]

LARGEST_RECIPE_BYTES = 1 << 20


class ConfigError(PykdError):
    """A recipe, a key or a value is wrong; the message is one sentence that names it."""


def teacher_name(number: int) -> str:
    """What the teacher ``number``, from 0, is called in tables and files.

    >>> [teacher_name(number) for number in range(3)]
    ['teacher', 'teacher-2', 'teacher-3']
    """
    return "teacher" if number == 0 else f"teacher-{number + 1}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Training(_Strict):
    """How one network is trained.

    >>> Training(epochs=3, lr=1e-2).lr
    0.01
    """

    epochs: Count = Field(default=10, description="passes over the training data")
    batch_size: Count = Field(default=128, description="global batch, over all processes")
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: Finite = Field(default=1e-3, gt=0, description="peak learning rate")
    momentum: Finite = Field(default=0.9, ge=0, lt=1, description="of sgd")
    weight_decay: Finite = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine", "step", "flat_linear"] = Field(
        default="cosine",
        description='stepped once an optimiser step; "step" divides the rate by 10 at 50 % and at 75 %, '
        '"flat_linear" is constant up to 50 % and then falls linearly to 0',
    )
    warmup: Finite = Field(default=0.0, ge=0, lt=1, description="share of the steps with a linearly rising rate")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    accumulate: Count = Field(default=1, description="micro-batches an optimiser step")
    clip_norm: Annotated[Finite, Field(gt=0)] | None = None
    augment: bool = Field(
        default=False, strict=True, description="augment as data.augment says; the teacher's logits are then not cached"
    )


def training_of(fields: Mapping[str, Any]) -> Training:
    """``Training`` of these fields.

    Raises:
        ValueError: an unknown field (with the nearest known one), or a value that one cannot have, in one sentence.
    """
    for name in fields:
        if name not in Training.model_fields:
            raise ValueError(f"unknown field {name!r}; {nearest(name, Training.model_fields)}")
    try:
        return Training.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from None


class Data(_Strict):
    """Which images a run reads, and how much of the training part is held out for every choice."""

    name: Literal["digits", "mnist", "svhn", "cifar10", "cifar100", "imagefolder"] = "digits"
    root: str | None = Field(default=None, description="folder of the files; else $PYKD_DATA, else ./data")
    download: bool = Field(
        default=False, strict=True, description="fetch missing files of mnist, svhn, cifar10 and cifar100 into the root"
    )
    holdout: Finite = Field(
        default=0.1, gt=0, lt=1, description="share of the training data, of every class, never trained on"
    )
    per_class: Count | None = Field(
        default=None, description="rows of each class that students learn from, of those not held out; None for all"
    )
    rows: Count | None = Field(
        default=None, description="rows that students learn from, whatever their classes, in place of per_class"
    )
    augment_once: bool = Field(
        default=False,
        strict=True,
        description="augment every row that students learn from once, as augment says; whether stages augment it anew "
        "is for training.augment to say",
    )
    image_size: Annotated[Count, Field(le=4096)] | None = Field(
        default=None, description="imagefolder: shorter side is scaled to this and the centre is cut out"
    )
    memory_limit_gib: Finite = Field(
        default=2.0, ge=0, description="larger image folders are decoded anew in every epoch"
    )
    augment: Literal["shift", "shift_flip", "crop", "crop_flip", "crop_cutout", "crop_flip_cutout"] = Field(
        default="shift",
        description="random shift by up to an eighth of the side, edges repeated (shift) or filled with black (crop); "
        "with flip also a random mirror image, with cutout a black square of half the side",
    )

    @field_validator("rows")
    @classmethod
    def _rows_or_per_class(cls, rows: int | None, info: ValidationInfo) -> int | None:
        if rows is not None and info.data.get("per_class") is not None:
            raise ValueError("should be left out where data.per_class is set")
        return rows


class Network(BaseModel):
    """A network of ``pykd.models`` by name; every other key is an argument of the network.

    >>> Network(name="mlp", widths=[32]).arguments
    {'widths': [32]}
    """

    model_config = ConfigDict(extra="allow", validate_default=True)

    name: str
    weights: str | None = Field(
        default=None, description="safetensors file to start from; a teacher is then not trained"
    )
    training: Training = Training()

    @property
    def arguments(self) -> dict[str, Any]:
        """The network's own arguments."""
        return dict(self.model_extra or {})


class Config(_Strict):
    """A whole recipe: what ``pykd distill`` runs and a run folder's ``config.yaml`` holds."""

    description: str = ""
    method: dict[str, Any] = Field(description="name of a method of pykd.methods, and its fields")
    data: Data = Data()
    teacher: Network
    more_teachers: list[Network] = Field(
        default=[], description="further teachers; the same network listed again is another seed of it"
    )
    student: Network
    baselines: list[str] = ["alone", "clean"]
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    checkpoint_seconds: Finite = Field(default=30.0, gt=0)
    keep_checkpoints: Count = 2
    cache_logits: bool = Field(
        default=True, strict=True, description="keep the teacher's logits in memory where the data are not augmented"
    )

    @field_validator("method")
    @classmethod
    def _method_has_a_name(cls, method: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(method.get("name"), str):
            raise ValueError("should have a name, e.g. {name: noisy_teacher}")
        return method

    @field_validator("student")
    @classmethod
    def _student_starts_fresh(cls, student: Network) -> Network:
        if student.weights is not None:
            raise ValueError("should not have weights: a student is always trained from its initial values")
        return student

    @property
    def teachers(self) -> dict[str, Network]:
        """All teachers, by the names of their rows and files."""
        return {teacher_name(number): each for number, each in enumerate([self.teacher, *self.more_teachers])}

    def to_yaml(self) -> str:
        """The recipe as YAML that loads to an equal ``Config``."""
        return dump(self.model_dump(mode="json"))


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (``1e-3`` is a number, ``no`` a word); no duplicate keys, no aliases, no tags."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012 (PyYAML's own)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            what = "aliases" if isinstance(event, yaml.AliasEvent) else "tags"
            raise yaml.constructor.ConstructorError(None, None, f"{what} are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "keys are words", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that YAML 1.2 or YAML 1.1 would read as something else."""


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _form in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": _FLOAT,
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), [None])
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), [None])


def dump(settings: Mapping[str, Any]) -> str:
    """Plain data as YAML that ``load`` reads back equal.

    >>> dump({"method": {"name": "1e-3"}})
    "method:\\n  name: '1e-3'\\n"
    """
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}: not valid YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = re.split("[;\n]", str(error))[0]
        raise ConfigError(f"{where}: not valid YAML: {reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply") from error


def mapping(text: str | bytes, where: str) -> dict[str, Any]:
    """What a recipe, or the ``config.yaml`` of a run, says, unchecked.

    Raises:
        ConfigError: no YAML, or no mapping.
    """
    recipe = _parse(text, where)
    if not isinstance(recipe, dict):
        raise ConfigError(f"{where}: a recipe is a mapping with keys such as {', '.join(Config.model_fields)}")
    return recipe


def nearest(word: str, known: Iterable[str]) -> str:
    """What to try instead of ``word``, as the end of a sentence.

    >>> nearest("epcohs", ["epochs", "lr"])
    "did you mean 'epochs'?"
    >>> nearest("zzz", ["epochs", "lr"])
    'known are epochs, lr'
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known) or 'none'}"


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    path = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        model: Any = Config
        for part in problem["loc"][:-1]:
            model = get_args(model)[0] if isinstance(part, int) else model.model_fields[part].annotation
        return f"unknown key {path!r}; {nearest(str(problem['loc'][-1]), model.model_fields)}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    if problem["type"] in ("dict_type", "model_type"):
        return f"{path} should be a mapping, got {reprlib.repr(problem['input'])}"
    message = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{path} {message}, got {reprlib.repr(problem['input'])}"


def override(recipe: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """``recipe`` with every ``key.key=value`` put in; values are read as YAML.

    >>> override({"student": {"name": "mlp"}}, ["student.widths=[8, 8]"])
    {'student': {'name': 'mlp', 'widths': [8, 8]}}

    Raises:
        ConfigError: where an assignment has no ``=``, no YAML value, or a key below something that has none.
    """
    result = dict(recipe)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        *parents, last = keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {assignment}: write key=value, e.g. student.training.epochs=5")
        place = result
        for depth, key in enumerate(parents, 1):
            below = {} if place.get(key) is None else place[key]
            if not isinstance(below, dict):
                raise ConfigError(f"--set {assignment}: {'.'.join(parents[:depth])} has no keys of its own")
            place[key] = dict(below)
            place = place[key]
        place[last] = _parse(text, f"--set {path}")
    return result


def lies_in(key: str, other: str) -> bool:
    """Whether a key is another, or one below it.

    >>> lies_in("method.alpha", "method"), lies_in("method", "method.alpha"), lies_in("methods", "method")
    (True, False, False)
    """
    return f"{key}.".startswith(f"{other}.")


def recipes() -> dict[str, str]:
    """Names of the packaged recipes, each with its description in one line."""
    files = (file for file in (resources.files("pykd") / "recipes").iterdir() if file.name.endswith(".yaml"))
    return {
        file.name.removesuffix(".yaml"): _parse(file.read_bytes(), file.name)["description"]
        for file in sorted(files, key=lambda file: file.name)
    }


def grid(axes: Iterable[str]) -> list[list[str]]:
    """Every combination of the values of all ``key=value,value`` axes, as assignments for ``load``.

    >>> grid(["method.sigma=0.1,0.5", "student.widths=[8],[16, 16]"])[3]
    ['method.sigma=0.5', 'student.widths=[16, 16]']
    """
    choices = []
    for axis in axes:
        key, equals, text = axis.partition("=")
        values = _parse(f"[{text}]", f"--grid {key}")
        if not equals or not values:
            raise ConfigError(f"--grid {axis}: write key=value,value, e.g. method.sigma=0.1,0.5")
        choices.append([f"{key}={json.dumps(value)}" for value in values])
    return [list(combination) for combination in itertools.product(*choices)]


def recipe_name(source: str) -> str:
    """The name a recipe's runs carry: the packaged name, or the file's name without its ending."""
    return Path(source).stem if source.endswith((".yaml", ".yml")) else Path(source).name


def load(source: str, assignments: Sequence[str] = ()) -> Config:
    """The recipe called ``source``, or in the file ``source``, with ``key=value`` assignments put in.

    >>> load("noisy_teacher-digits", ["student.training.epochs=1"]).student.training.epochs
    1

    Raises:
        ConfigError: unknown recipe, unreadable file, broken YAML, unknown key (with the nearest right one), value.
    """
    if source.endswith((".yaml", ".yml")) or Path(source).is_file():
        content = _read(Path(source))
    else:
        file = resources.files("pykd") / "recipes" / f"{source}.yaml"
        if "/" in source or not file.is_file():
            raise ConfigError(f"unknown recipe {source!r}; {nearest(source, recipes())}")
        content = file.read_bytes()
    recipe = mapping(content, source)
    try:
        return Config.model_validate(override(recipe, assignments))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


def load_data(name: object, assignments: Sequence[str] = ()) -> Data:
    """The data set called ``name``, or the one that ``data.key=value`` assignments describe.

    >>> load_data("mnist", ["data.holdout=0.2"]).holdout
    0.2

    Raises:
        ConfigError: no name, an unknown key, or a value that it cannot have.
    """
    rest = {"method": {"name": ""}, "teacher": {"name": ""}, "student": {"name": ""}}
    recipe = override({**rest, "data": {} if name is None else {"name": name}}, assignments)
    try:
        data = Config.model_validate(recipe).data
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    if "name" not in recipe["data"]:
        raise ConfigError("nothing says which data to use: add --set data.name=NAME, e.g. digits")
    return data


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_RECIPE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    if len(content) > LARGEST_RECIPE_BYTES:
        raise ConfigError(f"{file}: larger than a recipe can be ({LARGEST_RECIPE_BYTES} bytes)")
    return content


def choose(known: Mapping[str, T], name: str, where: str) -> T:
    """``known[name]``, where the name comes from a recipe's key ``where``.

    Raises:
        ConfigError: there is none of that name; says the nearest one.
    """
    if name not in known:
        raise ConfigError(f"{where}: unknown name {name!r}; {nearest(name, known)}")
    return known[name]


def construct(factory: Callable[..., T], arguments: Mapping[str, Any], where: str, **given: Any) -> T:
    """``factory(**arguments, **given)``, where the arguments come from a recipe's key ``where``.

    Raises:
        ConfigError: an argument that ``factory`` does not take (with the nearest it does), lacks, or refuses.
    """
    known = [name for name in inspect.signature(factory).parameters if name not in given]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"unknown key '{where}.{name}'; {nearest(name, known)}")
    try:
        return factory(**arguments, **given)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ) as error:  # torch's word for too little memory is the last
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
