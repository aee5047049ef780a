"""Settings and recipe strings that come from anywhere: each ends in a result or in a ValueError of one line.

Seeded random inputs: correct ones with parts exchanged, cut, doubled, or replaced by numbers and text that are far out.
"""

import json
import random
from functools import partial

import pytest

from sape2.config import RunConfig, override
from sape2.config.recipes import RECIPES, get_recipe
from sape2.encodings import create_encodings, find_encoding, list_encodings, parse_encoding
from sape2.encodings.base import AttentionEncoding
from sape2.encodings.options import describe_options

ODD_TEXT = [
    "", " ", "\n", "\0", "ä", "\ud800", "\U0001f600", "\uff1a", "\uff11\uff12", "\u202e", "sape2", "+", ":", ",", "=", "..",
    "'", '"', "\\", "../../etc/passwd", "None", "null", "true", "NaN", "Infinity", "-Infinity", "[" * 3000, "{" * 3000,
    "9" * 5000, "1e999", "-1", "0", "1e-320", "0x10", "1_000", "%s%n", "__import__('os')", "${HOME}", "x" * 2000,
]  # fmt: skip
ODD_VALUES = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400), 0.0, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), float("-inf"), "", "a", "\ud800", [], [1], [0.5], [10**400], ["a"], [[1]], {}, {"a": 1}, [1] * 1000,
]  # fmt: skip
FEW = pytest.param(300, id="few")
MANY = pytest.param(10_000, id="many", marks=pytest.mark.slow)


def outcome(function):
    """True for a result, False for one line; anything else is raised."""
    try:
        function()
    except ValueError as error:
        text = str(error)
        assert text
        assert "\n" not in text, text[:200]
        assert len(text) < 12_000, text[:200]
        return False
    return True


def check(count, seed, make):
    """Both ends must be met: results and refusals."""
    draw = random.Random(seed)
    outcomes = [outcome(make(draw)) for _ in range(count)]
    assert len(outcomes) == count
    assert 0.005 * count < sum(outcomes) < 0.995 * count
    return outcomes


# --- settings --------------------------------------------------------------------------------------------------------


PLAIN = [json.dumps(get_recipe(name).to_dict()) for name in RECIPES]


def random_config(draw):
    """A recipe's config as JSON gives it, with up to three places changed."""
    values = json.loads(draw.choice(PLAIN))
    for _ in range(draw.randrange(4)):
        place = values if draw.random() < 0.2 else values.get(draw.choice(["model", "data", "augment", "train"]))
        if not isinstance(place, dict) or not place:
            continue
        key = draw.choice(list(place))
        change = draw.randrange(4)
        if change == 0:
            del place[key]
        elif change == 1:
            place[draw.choice(ODD_TEXT)] = draw.choice(ODD_VALUES)
        else:
            place[key] = draw.choice(ODD_VALUES)
    return partial(use_config, values)


def use_config(values):
    config = RunConfig.from_dict(values)
    assert RunConfig.from_dict(config.to_dict()) == config
    json.dumps(config.identity(), allow_nan=False)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_any_config_is_one_that_survives_json_or_one_line(count):
    check(count, 0, random_config)


KEYS = [
    f"{section}.{key}"
    for section, values in get_recipe("digits").to_dict().items()
    if isinstance(values, dict)
    for key in values
]


def random_settings(draw):
    """--set KEY=VALUE, up to three times."""
    settings = []
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(KEYS) if draw.random() < 0.9 else draw.choice([*ODD_TEXT, draw.choice(KEYS).split(".")[1]])
        value = draw.choice([draw.choice(ODD_TEXT), json.dumps(draw.choice(ODD_VALUES)), str(draw.randint(1, 64))])
        settings.append(f"{key}{draw.choice(['=', '=', '=', '=', '', '=='])}{value}")
    return partial(override, get_recipe("digits"), settings)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_any_setting_is_taken_or_refused_in_one_line(count):
    check(count, 1, random_settings)


# --- recipe strings --------------------------------------------------------------------------------------------------


def options_of(name):
    """Option to some of its values: all choices, or numbers and odd text."""
    encoding = find_encoding(name)
    found = {}
    for option, values in describe_options(encoding.Options).items():
        found[option] = values.split("|") if "|" in values else ["1", "2", "7", "0.5", "-3", "none", values.split(" ")[0]]
    if issubclass(encoding, AttentionEncoding):
        found |= {"every": ["1", "2", "3", "0"], "share": ["true", "false"]}
    return found


OPTIONS = {name: options_of(name) for name in list_encodings()}


def random_part(draw):
    name = draw.choice(list(OPTIONS))
    known = OPTIONS[name]
    chosen = draw.sample(list(known), min(len(known), draw.randrange(3)))
    items = [f"{option}={draw.choice(known[option])}" for option in chosen]
    if chosen and draw.random() < 0.15:
        items.append(f"{draw.choice(chosen)}={draw.choice(ODD_TEXT)}")
    return f"{name}:{','.join(items)}" if items else name


def random_name(draw):
    """Parts joined with +, sometimes with odd text put in, a piece cut out, or a piece doubled."""
    text = "+".join(random_part(draw) for _ in range(draw.choice([1, 1, 1, 2, 2, 3])))
    change = draw.randrange(6)
    place, end = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
    if change == 0:
        text = text[:place] + draw.choice(ODD_TEXT) + text[place:]
    elif change == 1:
        text = text[:place] + text[end:]
    elif change == 2:
        text = text[:end] + text[place:]
    return partial(use_name, text)


def use_name(text):
    """What a model does with a name; heads and grid are those of a very small one."""
    parse_encoding(text)
    tokens, layers = create_encodings(text, 2, 8, (3, 4), 2)
    assert len(layers) == 2
    assert isinstance(tokens, list)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_any_recipe_string_makes_encodings_or_is_refused_in_one_line(count):
    check(count, 2, random_name)


def test_the_checker_sees_other_errors_and_several_lines():
    def raising(error):
        raise error

    for error in (TypeError("x"), RuntimeError("x"), RecursionError("x")):
        with pytest.raises(type(error)):
            outcome(partial(raising, error))
    for text in ("a\nb", ""):
        with pytest.raises(AssertionError):
            outcome(partial(raising, ValueError(text)))
