"""Windows and the pyramid: exact against slow loops, and against the plain ViT."""

import pytest
import torch

from sape2.config import ModelConfig, model_config
from sape2.detection.backbone import WindowedViT, run_block, spread
from sape2.detection.pyramid import PyramidBackbone, SimpleFeaturePyramid, strides
from sape2.models.vit import ViT

GRIDS = [((5, 7), 3), ((4, 6), 2), ((2, 2), 4), ((6, 3), 1), ((3, 8), 3)]


def small(encoding="ape+sape2", image_size=(20, 28), **options) -> ModelConfig:
    options = {"dim": 24, "depth": 3, "num_heads": 2, "patch_size": 4, "pool": "mean", "num_classes": 3} | options
    return model_config("vit_nano", encoding=encoding, image_size=image_size, **options)


# --- windows ---------------------------------------------------------------------------------------------------------


def literal_windows(x, grid, window, function):
    """Window by window and image by image."""
    height, width = grid
    out = torch.empty_like(x)
    for number in range(len(x)):
        for top in range(0, height, window):
            for left in range(0, width, window):
                rows, columns = range(top, min(top + window, height)), range(left, min(left + window, width))
                places = [y * width + x for y in rows for x in columns]
                out[number, places] = function(x[number : number + 1, places], (len(rows), len(columns)))[0]
    return out


@pytest.mark.parametrize(("grid", "window"), GRIDS, ids=str)
def test_the_windowed_block_is_the_literal_loop(grid, window):
    """Attention by windows, everything else token by token, in float64."""
    model = ViT(small("rope+sape2", (grid[0] * 4, grid[1] * 4), depth=1, layer_scale=0.7)).double()
    block = next(iter(model.layers()))
    x = torch.randn(1, grid[0] * grid[1], 24, dtype=torch.float64)
    found = run_block(block, x, grid, window)
    torch.testing.assert_close(found, literal_windows(x, grid, window, block), rtol=0, atol=1e-12)
    if max(grid) > window:
        assert (found - block(x, grid)).abs().max() > 1e-6  # the comparison can tell windows from none


def test_drop_path_drops_images_and_not_windows():
    """With the MLP switched off an image of the batch is changed in all of its windows or in none."""
    block = list(ViT(small("none", drop_path=0.5)).layers())[-1].train()
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
        x = torch.randn(64, 35, 24)
        changed = (run_block(block, x, (5, 7), 3) != x).any(-1)
    assert set(changed.float().mean(1).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("encoding", ["ape+sape2", "cpe+rope", "rpe", "cope"])
def test_a_window_as_large_as_the_grid_gives_the_features_of_the_plain_vit(encoding):
    config = small(encoding, depth=2)
    windowed, plain = WindowedViT(config, window=7, num_global=1).double(), ViT(config).double()
    windowed.vit.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    expected = plain.features(images).transpose(1, 2).unflatten(-1, (5, 7))
    torch.testing.assert_close(windowed(images), expected, rtol=0, atol=1e-12)


def test_nothing_leaves_its_window_without_global_blocks():
    model = WindowedViT(small(), window=3, num_global=0).double()
    images = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    other = images.clone()
    other[..., :12, :12] += 1  # the first window of 3x3 patches
    changed = (model(images) != model(other)).any(1)[0]
    assert changed[:3, :3].all()
    assert not changed[3:].any()
    assert not changed[:, 3:].any()
    assert (WindowedViT(small(), window=3, num_global=1).double()(other) != model(images)).any(1).all()


def test_global_blocks_are_spread_evenly_and_the_last_is_one():
    assert spread(12, 4) == [2, 5, 8, 11]
    assert spread(4, 2) == [1, 3]
    assert spread(9, 4)[-1] == 8
    assert spread(4, 0) == []
    with pytest.raises(ValueError, match=r" 4\b.* 5\b"):
        spread(4, 5)


def test_encodings_of_window_blocks_are_made_for_a_window():
    model = WindowedViT(small("sape2"), window=3, num_global=1)
    assert [block.attn.encoding.num_positions for block in model.vit.layers()] == [4, 4, 8]
    assert any(name.endswith("blocks.0.attn.encoding.table_x") for name in model.no_weight_decay())


@pytest.mark.parametrize("options", [{"pool": "class"}, {"num_registers": 2}])
def test_prefix_tokens_are_refused(options):
    with pytest.raises(ValueError, match="prefix tokens"):
        WindowedViT(small(**options), window=3)


def test_gradient_checkpointing_changes_no_gradient():
    plain, checked = (WindowedViT(small(gradient_checkpointing=flag), 3, 1).double() for flag in (False, True))
    checked.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    for model in (plain, checked):
        model(images).square().sum().backward()
    for one, other in zip(plain.parameters(), checked.parameters(), strict=True):
        assert one.grad is not None  # nothing of the backbone is left over
        torch.testing.assert_close(one.grad, other.grad)


# --- pyramid ---------------------------------------------------------------------------------------------------------


def test_levels_have_the_strides_they_declare():
    config = small(image_size=(64, 96), patch_size=16)
    body = WindowedViT(config, window=2, num_global=1)
    backbone = PyramidBackbone(body, SimpleFeaturePyramid(24, 8))
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    wanted = strides(16, (4.0, 2.0, 1.0, 0.5), True)
    assert wanted == [4, 8, 16, 32, 64]
    assert [tuple(m.shape) for m in maps.values()] == [(2, 8, 64 // s, -(-96 // s)) for s in wanted]
    assert backbone.out_channels == 8
    assert all(torch.isfinite(m).all() for m in maps.values())


def test_every_place_of_a_finer_level_comes_from_the_patch_below_it():
    """Up to the reach of the last 3x3 convolution: a patch changes nothing two places away from its own cells."""
    pyramid = SimpleFeaturePyramid(8, 4, (4.0, 2.0), extra_level=False)
    features = torch.randn(1, 8, 4, 5)
    other = features.clone()
    other[..., 2, 3] += 1
    for scale, one, two in zip((4, 2), pyramid(features).values(), pyramid(other).values(), strict=True):
        rows, columns = (one != two).any(1)[0].nonzero().unbind(1)
        assert (rows.min(), rows.max()) == (2 * scale - 1, 3 * scale)
        assert (columns.min(), columns.max()) == (3 * scale - 1, 4 * scale)


def test_a_pyramid_finer_than_pixels_is_refused():
    with pytest.raises(ValueError, match=r" 4 .* 2\b"):
        strides(2, (4.0, 2.0), False)
    with pytest.raises(ValueError, match="scales"):
        SimpleFeaturePyramid(8, 4, (3.0,))
