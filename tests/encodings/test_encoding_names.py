"""Names: joined, with options, with a schedule over layers, and everything that contradicts itself."""

import numpy as np
import pytest
import torch

from sape2 import create_encoding, create_model, list_encodings
from sape2.attention import attend
from sape2.encodings import NoEncoding, SaPE2, create_encodings, find_encoding
from sape2.encodings.base import Composite
from sape2.encodings.options import describe_options

VARIANTS = [f"{name}:{variant}" for name in list_encodings() for variant in find_encoding(name).variants]


def test_every_encoding_says_what_it_is_in_one_line():
    for name in list_encodings():
        encoding = find_encoding(name)
        assert encoding.summary
        assert "\n" not in encoding.summary
        assert encoding.source


@pytest.mark.parametrize("name", [name for name in VARIANTS if "num_positions" not in name])
def test_every_listed_variant_differs_from_the_plain_encoding(name):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 20, 8)
    maps = []
    for variant in (name, name.partition(":")[0]):
        encoding = create_encoding(variant, num_heads=2, head_dim=8, grid=(4, 5))
        with torch.no_grad():
            for parameter in encoding.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter).sin() + 0.5)
        turned = torch.cat([t.flatten() for t in encoding.eval().rotate(q, k, (4, 5))])
        bias = encoding.bias(q, k, (4, 5), q.transpose(1, 2).flatten(2))
        maps.append(turned if bias is None else torch.cat([turned, bias.dense().expand(1, 2, -1, -1).flatten()]))
    assert (maps[0] - maps[1]).abs().max() > 1e-4


def test_ten_positions_clamp_what_the_default_table_does_not():
    sizes = {
        name: create_encoding(name, 2, 8, (16, 16)).num_positions
        for name in ("cope", "cope:num_positions=10", "sape2", "sape2:num_positions=10")
    }
    assert list(sizes.values()) == [257, 10, 17, 10]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("none", ""),
        ("sape2", ""),
        ("rope", ""),
        ("ape", ""),
        ("sape2:axes=x,count=cyclic", "count=cyclic, axes=x"),
        ("alibi:metric=manhattan", "metric=manhattan"),
        ("cpe:padding=circular", "padding=circular"),
        ("cope:num_positions=10", "num_positions=10"),
    ],
)
def test_an_encoding_shows_the_options_that_are_not_at_their_default(name, shown):
    encoding = create_encoding(name, num_heads=2, head_dim=8, grid=(3, 4))
    assert encoding.extra_repr() == shown
    assert shown in repr(encoding)


@pytest.mark.parametrize("name", ["ape+rope+sape2", "sape2+ape+rope", "rope+sape2+ape"])
def test_order_does_not_matter(name):
    models = []
    for text in (name, "ape+rope+sape2"):
        torch.manual_seed(0)
        models.append(create_model("vit_nano", encoding=text, image_size=16, patch_size=4, dim=24, depth=2, num_heads=3).eval())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(models[0](images), models[1](images))


def test_a_schedule_puts_an_encoding_into_every_nth_layer_counted_from_one():
    _, layers = create_encodings("rope+sape2:every=3", 2, 8, (3, 4), depth=7)
    assert [isinstance(layer, Composite) for layer in layers] == [False, False, True, False, False, True, False]
    _, layers = create_encodings("sape2:every=2", 2, 8, (3, 4), depth=4)
    assert [type(layer) for layer in layers] == [NoEncoding, SaPE2, NoEncoding, SaPE2]
    assert layers[1] is not layers[3]


def test_shared_layers_have_one_table():
    _, layers = create_encodings("sape2:share=true,every=2", 2, 8, (3, 4), depth=4)
    assert layers[1] is layers[3]
    model = create_model("vit_nano", encoding="sape2:share=true")
    own = create_model("vit_nano", encoding="sape2")
    count = [sum(p.numel() for p in m.parameters()) for m in (model, own)]
    assert count[1] - count[0] == 3 * 2 * 9 * 32


def test_a_table_for_every_layer_comes_before_every_block():
    tokens, layers = create_encodings("ape:every_layer=true+rope", 2, 8, (3, 4), depth=3)
    assert [module.after_block for module in tokens] == [None, 0, 1]
    assert len({id(module.table) for module in tokens}) == len(layers) == 3
    tokens, _ = create_encodings("ape+cpe", 2, 8, (3, 4), depth=3)
    assert [module.after_block for module in tokens] == [None, 0]


def test_a_table_for_every_layer_is_added_to_what_enters_each_block():
    size = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 3, "pool": "class"}
    model = create_model("vit_nano", encoding="ape:every_layer=true", **size).eval()
    images = torch.randn(2, 3, 16, 16)
    x, grid = model.embed(images)
    x = model.blocks[0](x, grid)
    table = model.token_encodings[1].table.flatten(0, 1)
    x = model.blocks[1](torch.cat([x[:, :1], x[:, 1:] + table], dim=1), grid)
    torch.testing.assert_close(model.features(images), model.norm(x))


def test_options_are_described_with_the_default_first():
    described = describe_options(SaPE2.Options)
    assert described["count"] == "suffix|prefix|both|between|cyclic"
    assert described["divide_bias"] == "false|true"
    assert described["num_positions"] == "None (a whole number)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown encoding ''"),
        ("rope+", "unknown encoding ''"),
        ("Sape2", "unknown encoding 'Sape2'.*none, ape, sincos"),
        ("rope+rope", "rope twice"),
        ("sape2:dot=key+sape2", "sape2 twice"),
        ("rope+rope_mixed", "rope and rope_mixed"),
        ("rope+pope", "rope and pope"),
        ("ape+sape2+sincos", "ape and sincos"),
        ("none+sape2", "joins none"),
        ("sape2:count=cyclic,count=both", "key once"),
        ("sape2:count", "key=value"),
        ("sape2:=3", "no option ''"),
        ("sape2:every=0", "every.* 1"),
        ("sape2:every=two", "sape2:every.*'two'"),
        ("sape2:num_positions=2.5", "sape2:num_positions.*'2.5'"),
        ("sape2:table_std=wide", "sape2:table_std.*'wide'"),
        ("sape2:share=yes", "sape2:share.*'yes'"),
        ("cpe:share=true", "once on the tokens"),
        ("ape:count=both", "^ape .*'count'.* resize, every_layer$"),
        ("none:count=both", "^none .*'count'.* every, share$"),
    ],
)
def test_contradictions_and_mistakes_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        create_encodings(name, 2, 8, (3, 4), depth=2)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(0, 8), (-1, 8), ("2", 8), (2, 8.0), (2, 0)], ids=str)
@pytest.mark.parametrize("name", ["none", "sape2", "ape"])
def test_heads_are_positive_whole_numbers(name, num_heads, head_dim):
    with pytest.raises(ValueError, match="num_heads and head_dim must be positive integers; got"):
        create_encoding(name, num_heads, head_dim, (3, 4))


@pytest.mark.parametrize(
    "grid", [np.array([3, 4]), (np.int64(3), np.int32(4)), torch.tensor([3, 4])], ids=["array", "numbers", "tensor"]
)
def test_numbers_of_other_libraries_are_numbers(grid):
    encoding = create_encoding("sape2", np.int64(2), np.int64(8), grid)
    assert (encoding.num_heads, encoding.head_dim, encoding.grid) == (2, 8, (3, 4))
    assert all(type(number) is int for number in (encoding.num_heads, encoding.head_dim, *encoding.grid))
    q = torch.randn(1, 2, 12, 8)
    assert torch.equal(attend(q, q, q, grid, encoding), attend(q, q, q, (3, 4), encoding))


def test_one_layer_has_no_schedule_and_no_tokens():
    with pytest.raises(ValueError, match="every"):
        create_encoding("sape2:every=2", 2, 8, (3, 4))
    with pytest.raises(ValueError, match="ape acts on the tokens"):
        create_encoding("ape+sape2", 2, 8, (3, 4))
