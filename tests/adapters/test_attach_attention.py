"""An encoding in a plain nn.MultiheadAttention, alone and inside nn.TransformerEncoderLayer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sape2 import SaPEAttention, attach_attention, detach, set_grid
from sape2.adapters.attached import attached_encodings

GRID, PREFIX, TOKENS = (2, 3), 1, 7


def attention(encoding="sape2", **options):
    """An attached attention in float64 with random weights, gains too."""
    module = nn.MultiheadAttention(8, 2, **{"batch_first": True, "dtype": torch.float64} | options)
    for parameter in attach_attention(module, encoding, grid=GRID, num_prefix_tokens=PREFIX).parameters():
        nn.init.normal_(parameter)
    return module.eval()


def plain(module):
    """The same attention without encoding, and the bias that it would have to add, (B h, T, T)."""
    copied = copy.deepcopy(module)
    encoding = attached_encodings(copied)[0]

    def bias(x):
        q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        dense = encoding.bias(q[:, :, PREFIX:], k[:, :, PREFIX:], GRID).dense().expand(len(x), -1, -1, -1)
        return F.pad(dense, (PREFIX, 0, PREFIX, 0)).flatten(0, 1)

    return detach(copied), bias


@pytest.mark.parametrize("need_weights", [False, True])
def test_it_is_the_host_s_attention_under_the_bias_as_its_mask(need_weights):
    module, x = attention(), torch.randn(3, TOKENS, 8).double()
    host, bias = plain(module)
    found, weights = module(x, x, x, need_weights=need_weights)
    expected, expected_weights = host(x, x, x, need_weights=True, attn_mask=bias(x))
    torch.testing.assert_close(found, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
        per_head = module(x, x, x, average_attn_weights=False)[1]
        torch.testing.assert_close(per_head, host(x, x, x, attn_mask=bias(x), average_attn_weights=False)[1])


def test_without_a_batch_and_with_the_sequence_first():
    module, x = attention(), torch.randn(3, TOKENS, 8).double()
    expected, weights = module(x, x, x)
    alone = x[0]
    single, single_weights = module(alone, alone, alone)
    torch.testing.assert_close((single, single_weights), (expected[0], weights[0]))
    module.batch_first = False
    turned = x.transpose(0, 1)
    torch.testing.assert_close(module(turned, turned, turned)[0], expected.transpose(0, 1))


def test_masks_of_pairs_and_of_padding_join_the_bias():
    module, x = attention("rpe"), torch.randn(3, TOKENS, 8).double()
    host, bias = plain(module)
    hidden = torch.rand(TOKENS, TOKENS) > 0.7
    hidden.fill_diagonal_(False)
    padding = torch.zeros(3, TOKENS, dtype=torch.bool)
    padding[1, -2:] = True
    additive = bias(x).unflatten(0, (3, 2)) + torch.zeros(TOKENS, TOKENS).masked_fill(hidden, -torch.inf)
    additive = (additive + torch.zeros(3, 1, 1, TOKENS).masked_fill(padding[:, None, None], -torch.inf)).flatten(0, 1)
    expected = host(x, x, x, attn_mask=additive)[0]
    for need_weights in (True, False):
        found = module(x, x, x, attn_mask=hidden, key_padding_mask=padding, need_weights=need_weights)[0]
        torch.testing.assert_close(found, expected)
    per_head = hidden.expand(6, -1, -1)
    torch.testing.assert_close(module(x, x, x, attn_mask=per_head, key_padding_mask=padding)[0], expected)


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_layer_in_evaluation_does_not_pass_it_by(padded):
    """nn.TransformerEncoderLayer has a fast path that reads the weights of its attention and never calls it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(3, TOKENS, 8)
    mask = torch.zeros(3, TOKENS, dtype=torch.bool) if padded else None
    with torch.no_grad():
        before = layer(x, src_key_padding_mask=mask)
        attach_attention(layer.self_attn, "rpe", grid=GRID, num_prefix_tokens=PREFIX)
        torch.testing.assert_close(layer(x, src_key_padding_mask=mask), before, rtol=1e-4, atol=1e-4)
        for parameter in attached_encodings(layer.self_attn)[0].parameters():
            nn.init.normal_(parameter)
        biased = layer(x, src_key_padding_mask=mask)
        assert (biased - before).abs().max() > 1e-2
    torch.testing.assert_close(layer(x, src_key_padding_mask=mask), biased)
    with torch.no_grad():
        detach(layer.self_attn)
        assert torch.equal(layer(x, src_key_padding_mask=mask), before)


def test_nested_tensors_are_refused_and_not_passed_by():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    attach_attention(encoder.layers[0].self_attn, "rpe", grid=GRID, num_prefix_tokens=PREFIX)
    padding = torch.zeros(3, TOKENS, dtype=torch.bool)
    padding[0, -1] = True
    with torch.no_grad(), pytest.raises(ValueError, match="enable_nested_tensor=False"):
        encoder(torch.randn(3, TOKENS, 8), src_key_padding_mask=padding)


def test_the_grid_of_calls_can_be_set():
    module = attention()
    set_grid(module, (3, 4))
    x = torch.randn(1, 13, 8).double()
    assert module(x, x, x)[0].shape == x.shape
    x = x[:, :7]
    with pytest.raises(ValueError, match=r"3x4 patches .*7 tokens"):
        module(x, x, x)


def test_dropout_acts_in_training_only():
    module = attention(dropout=0.5)
    x = torch.randn(1, TOKENS, 8).double()
    for need_weights in (True, False):
        assert torch.equal(module.eval()(x, x, x, need_weights=need_weights)[0], module(x, x, x, need_weights=need_weights)[0])
        module.train()
        assert not torch.equal(module(x, x, x, need_weights=need_weights)[0], module(x, x, x, need_weights=need_weights)[0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: attach_attention(nn.Linear(2, 2), grid=GRID), "nn.MultiheadAttention.* Linear"),
        (lambda: attach_attention(nn.MultiheadAttention(8, 2, kdim=4), grid=GRID), "kdim and vdim"),
        (lambda: attach_attention(nn.MultiheadAttention(8, 2, add_bias_kv=True), grid=GRID), "grid"),
        (lambda: attach_attention(nn.MultiheadAttention(8, 2), grid=(2,)), r"grid needs two positive integers \(H, W\)"),
        (lambda: attention()(torch.zeros(1, 7, 8), torch.zeros(1, 7, 8), torch.zeros(1, 7, 8)), "for self-attention"),
        (lambda: attention()(*[torch.zeros(1, 7, 8)] * 3, is_causal=True), "is_causal=True"),
        (lambda: set_grid(nn.MultiheadAttention(8, 2), GRID), "nothing is attached"),
        (lambda: SaPEAttention(8, 0, grid=GRID), "divisible by the number of heads; got dim=8, num_heads=0"),
        (lambda: SaPEAttention(8, "2", grid=GRID), "got dim=8, num_heads='2'"),
    ],
)
@pytest.mark.usefixtures("as_users_call_it")
def test_mistakes_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
