"""The forms of the search start as what they say they start as, and read content once their weights are not 0."""

from dataclasses import replace

import gate_forms
import pytest
import torch

from sape2.encodings import ATTENTION_ENCODINGS, canonical_name, create_encoding

HEADS, WIDTH, GRID = 2, 8, (3, 5)


@pytest.fixture
def qk():
    return torch.randn(2, 2, HEADS, 15, WIDTH, dtype=torch.float64)


def products(encoding, q, k):
    q, k = encoding.rotate(q, k, GRID)
    return q @ k.mT


@pytest.mark.parametrize("mode", ["count", "wide", "shift"])
def test_counted_starts_as_rope_and_then_depends_on_content(mode, qk):
    form = gate_forms.Counted(HEADS, WIDTH, GRID, mode=mode).double()
    rope = create_encoding("rope", HEADS, WIDTH, GRID).double()
    torch.testing.assert_close(products(form, *qk), products(rope, *qk))
    torch.nn.init.normal_(form.weight)
    assert not torch.allclose(products(form, *qk), products(rope, *qk))


def test_gates_of_their_own_start_as_constant_ones(qk):
    torch.manual_seed(0)
    own = gate_forms.Opened(HEADS, WIDTH, GRID, own=4).double()
    torch.manual_seed(0)
    constant = gate_forms.Opened(HEADS, WIDTH, GRID, const=1).double()
    assert torch.equal(own.bias(*qk, GRID).dense(), constant.bias(*qk, GRID).dense())
    torch.nn.init.normal_(own.to_keys)
    assert not torch.allclose(own.bias(*qk, GRID).dense(), constant.bias(*qk, GRID).dense())


def test_open_gates_count_columns_and_rows(qk):
    """Nearly: sigmoid(4) is 0.98."""
    form = gate_forms.Opened(HEADS, WIDTH, GRID, start=40.0, const=1).double()
    plain = create_encoding("sape2:readout=direct,gates=none", HEADS, WIDTH, GRID).double()
    plain.load_state_dict({name: value for name, value in form.state_dict().items() if name != "offset"})
    torch.testing.assert_close(form.bias(*qk, GRID).dense(), plain.bias(*qk, GRID).dense())


@pytest.mark.parametrize("reads", ["way", "end"])
def test_halved_counts_read_content_on_the_way_or_at_the_end_alone(reads, qk):
    form = gate_forms.Halved(HEADS, WIDTH, GRID, reads=reads).double()
    maps, (q, k) = form.maps(*qk, GRID), qk
    gates = maps["gates_x"][0, 1, 7]  # of the patch in row 1, column 2
    torch.testing.assert_close(gates, torch.sigmoid(q[0, 1, 7] @ k[0, 1, 5:10].mT * WIDTH**-0.5))
    behind = gates[2:].sum() if reads == "way" else 3 * 0.5
    assert maps["positions_x"][0, 1, 7, 1].item() == pytest.approx((behind + (0.5 if reads == "way" else gates[1])).item())
    torch.testing.assert_close(maps["bias"], form.bias(*qk, GRID).dense())


@pytest.mark.parametrize("const", [0, 1])
def test_decay_is_minus_the_rate_times_the_gates_on_the_way(const):
    form, (q, k) = gate_forms.Decayed(HEADS, WIDTH, GRID, const=const).double(), torch.randn(2, 1, HEADS, 15, WIDTH).double()
    bias = form.bias(q, k, GRID).dense()
    gate = 0.5 if const else torch.sigmoid(q @ k.transpose(-2, -1) * WIDTH**-0.5)[0, 1, 6]  # of the patch in row 1, column 1
    by_column = gate * torch.ones(15) if const else gate
    assert bias[0, 1, 6, 8].item() == pytest.approx(-0.25 * (by_column[7] + by_column[8]).item())
    assert bias[0, 1, 6, 0].item() == pytest.approx(-0.25 * (by_column[5] + by_column[1]).item())


def test_forget_is_parted_into_the_way_and_its_end(qk):
    """Both parts that read, less one that reads nothing, are `forget`; between neighbours there is no way, only an end."""
    tokens = torch.randn(2, 15, HEADS * WIDTH, dtype=torch.float64)
    whole = create_encoding("forget:start=1", HEADS, WIDTH, GRID).double()
    faded = gate_forms.Faded(HEADS, WIDTH, GRID, start=1.0).double()

    def bias(encoding):
        return encoding.bias(*qk, GRID, tokens=tokens).dense()

    def part(reads):
        form = gate_forms.Parted(HEADS, WIDTH, GRID, start=1.0, reads=reads).double()
        form.load_state_dict(whole.state_dict())
        return bias(form) - bias(faded)

    way, end = part("way"), part("end")
    torch.testing.assert_close(way + end, bias(whole) - bias(faded))
    assert way[..., 6, [1, 5, 7, 11]].abs().max() < 1e-12 < way[..., 6, 8].abs().min()
    weights = whole.weight[1, 1] @ tokens[..., 8, :, None] + 1  # of columns, onwards: (2, 2, 1)
    expected = torch.nn.functional.logsigmoid(weights) - torch.nn.functional.logsigmoid(torch.ones(()))
    torch.testing.assert_close(end[..., 6, 8], expected[..., 0].to(end))


def test_a_form_is_compared_with_its_control_in_pairs_of_a_seed_on_the_same_grid_and_images(monkeypatch):
    def row(encoding, seed, test, patch=4, images="cifar10"):
        rows = [{"name": "accuracy", "weights": "last", "value": test}]
        settings = {"model": {"patch_size": patch}, "data": {"name": images}}
        digest = f"{encoding} {seed} {patch} {images}"
        return {"digest": digest, "encoding": encoding, "seed": seed, "settings": settings, "rows": rows} | {
            "curve": {"validation_accuracy": [0.5, test]}
        }

    monkeypatch.setattr(gate_forms, "read_rows", lambda path: [])
    rows = [row("counted", 1, 0.7), row("counted", 2, 0.8), row("rope", 1, 0.6), row("rope", 3, 0.1)]
    rows += [row("counted", 1, 0.3, patch=2), row("rope", 1, 0.4, patch=2), row("rope", 2, 0.9, patch=2)]
    rows += [row("counted", 1, 0.5, images="placed"), row("rope", 1, 0.3, images="placed")]
    lines = [[cell.strip() for cell in line.split("|")[3:9]] for line in gate_forms.table(rows).splitlines()[2:]]
    assert lines == [
        ["cifar10", "4", "0.7000", "0.6000", "1", "+0.1000"],
        ["cifar10", "2", "0.3000", "0.4000", "1", "-0.1000"],
        ["placed", "4", "0.5000", "0.3000", "1", "+0.2000"],
    ]


def test_a_finer_grid_changes_the_patch_and_nothing_else():
    (plain,), (fine,) = gate_forms.trials(["rope"], [1]), gate_forms.trials(["rope"], [1], patch=2)
    assert plain.digest == next(gate_forms.sprint_plan.one_rate(["rope"], [1])).digest != fine.digest
    assert fine.config.model == replace(plain.config.model, patch_size=2)
    assert fine.config.train == plain.config.train


def test_other_images_change_their_name_and_nothing_else():
    (plain,), (other,) = gate_forms.trials(["rope"], [1]), gate_forms.trials(["rope"], [1], images="placed_cifar10")
    assert other.config == replace(plain.config, data=replace(plain.config.data, name="placed_cifar10"))
    assert other.digest != plain.digest


@pytest.mark.parametrize("name", dict.fromkeys(name for pair in gate_forms.CONTROLS for name in pair))
def test_forms_and_controls_are_named_as_their_rows_name_them(name, monkeypatch):
    for form in gate_forms.FORMS.items():
        monkeypatch.setitem(ATTENTION_ENCODINGS, *form)
    assert canonical_name(name) == name
