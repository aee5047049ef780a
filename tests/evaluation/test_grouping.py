"""Statistics of pairs against literal loops, ideal and bad cases, and the rows that `grouping` gives for a model."""

import math

import numpy as np
import pytest
import torch
from evaluation_cases import labelled_images

from sape2 import create_model
from sape2.data import ImageData
from sape2.evaluation import pairs
from sape2.evaluation.grouping import grouping
from sape2.evaluation.layers import layers_of, mapped

GRID = (3, 4)
N = 12
NAN = float("nan")


def place(i):
    return i // GRID[1], i % GRID[1]


def distance(i, n):
    return math.dist(place(i), place(n))


def steps(i, n):
    return max(abs(a - b) for a, b in zip(place(i), place(n), strict=True))


def random_attention(*lead):
    return torch.randn(*lead, N, N, dtype=torch.float64).mul(2).softmax(-1)


def random_labels(images=3):
    labels = torch.randint(0, 3, (images, N))
    labels[0, 5] = -1  # not labelled
    return labels


def label_pairs(labels):
    """(same, labelled): pairs of one label, and pairs of which both patches have one."""
    known = labels >= 0
    return labels[:, :, None] == labels[:, None], known[:, :, None] & known[:, None]


def over_images_and_heads(literal, *maps):
    """literal(map of one image and head, ..., image number) for all of them, as a tensor (B, h)."""
    shape = maps[0].shape[:2]
    return torch.tensor(
        [[literal(*(m[b, h] for m in maps), b) for h in range(shape[1])] for b in range(shape[0])], dtype=torch.float64
    )


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


# --- against literal loops -------------------------------------------------------------------------------------------


def test_attention_distance_and_entropy_against_literal_loops():
    attention = random_attention(2, 3)
    agree(
        pairs.attention_distance(attention, GRID),
        over_images_and_heads(
            lambda a, _: sum(float(a[i, n]) * distance(i, n) for i in range(N) for n in range(N)) / N, attention
        ),
    )
    agree(
        pairs.attention_entropy(attention),
        over_images_and_heads(
            lambda a, _: sum(-float(a[i, n]) * math.log(a[i, n]) for i in range(N) for n in range(N)) / N, attention
        ),
    )


def counted(labels, first, last):
    """(i, n, same label?) of the pairs of one image that count, by the definition."""
    return [
        (i, n, labels[i] == labels[n])
        for i in range(N)
        for n in range(N)
        if first <= steps(i, n) <= last and labels[i] >= 0 and labels[n] >= 0
    ]


def literal_lift(attention, pairs_of_image):
    lifts = []
    for i in range(N):
        mine = [(n, same) for j, n, same in pairs_of_image if j == i]
        if not any(same for _, same in mine):
            continue
        attended = sum(float(attention[i, n]) for n, same in mine if same) / sum(float(attention[i, n]) for n, _ in mine)
        lifts.append(attended / (sum(same for _, same in mine) / len(mine)))
    return sum(lifts) / len(lifts) if lifts else NAN


def literal_auroc(scores, pairs_of_image):
    positives = [float(scores[i, n]) for i, n, same in pairs_of_image if same]
    negatives = [float(scores[i, n]) for i, n, same in pairs_of_image if not same]
    wins = sum((p > q) + 0.5 * (p == q) for p in positives for q in negatives)
    return wins / (len(positives) * len(negatives)) if positives and negatives else NAN


@pytest.mark.parametrize("stratum", pairs.DISTANCES)
def test_lift_and_auroc_against_literal_loops(stratum):
    first, last = pairs.DISTANCES[stratum]
    labels, attention = random_labels(), random_attention(3, 2)
    bias = torch.randint(0, 5, (3, 2, N, N)).double()  # with many ties
    if stratum == "farther":  # 3x4 has no such pair
        assert stratum not in pairs.distance_strata(GRID)
        return
    same, labelled = label_pairs(labels)
    counts = labelled & pairs.distance_strata(GRID)[stratum]
    chosen = [counted(image, first, last) for image in labels.tolist()]
    agree(
        pairs.same_label_lift(attention, same, counts),
        over_images_and_heads(lambda a, b: literal_lift(a, chosen[b]), attention),
    )
    ranking = pairs.rank(bias.flatten(2))
    agree(
        pairs.auroc(ranking, same.flatten(1)[:, None], counts.flatten(1)[:, None]),
        over_images_and_heads(lambda values, b: literal_auroc(values, chosen[b]), bias),
    )


def test_separation_and_grouping_index_against_literal_loops():
    labels, attention, bias = random_labels(), random_attention(3, 2), torch.randn(3, 2, N, N, dtype=torch.float64)
    same, labelled = label_pairs(labels)
    counts = labelled & pairs.distance_strata(GRID)["all"]
    chosen = [counted(image, 1, 99) for image in labels.tolist()]

    def split(values, b):
        return [[float(values[i, n]) for i, n, same in chosen[b] if same is kind] for kind in (True, False)]

    def literal_separation(values, b):
        within, across = split(values, b)
        return (np.mean(across) - np.mean(within)) / math.sqrt((np.var(across) + np.var(within)) / 2)

    def literal_index(values, b):
        within, across = (np.mean(part) for part in split(values, b))
        return (within - across) / (within + across)

    agree(pairs.separation(bias, same, counts), over_images_and_heads(literal_separation, bias))
    agree(pairs.grouping_index(attention, same, counts), over_images_and_heads(literal_index, attention))


def test_partial_correlation_is_that_of_regression_residuals():
    """Both variables regressed on the control with numpy; the correlation of what is left."""
    bias, tokens = torch.randn(2, 3, N, N, dtype=torch.float64), torch.randn(2, N, 5, dtype=torch.float64)
    apart, features = pairs.distances(GRID), pairs.feature_distance(tokens)
    bias = bias + features[:, None] + apart
    found = pairs.partial_correlation(bias, features, apart, apart > 0)
    off_diagonal = ~np.eye(N, dtype=bool)
    control = np.stack([apart.numpy()[off_diagonal], np.ones(N * N - N)], axis=1)
    for b, h in np.ndindex(2, 3):
        left = []
        for values in (bias[b, h], features[b]):
            y = values.numpy()[off_diagonal]
            left.append(y - control @ np.linalg.lstsq(control, y, rcond=None)[0])
        agree(found[b, h], torch.tensor(np.corrcoef(*left)[0, 1]))


def test_feature_distance_is_one_minus_the_cosine():
    tokens = torch.randn(2, N, 5, dtype=torch.float64)
    expected = 1 - torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    torch.testing.assert_close(pairs.feature_distance(tokens), expected, rtol=1e-10, atol=1e-10)


# --- ideal and bad cases ---------------------------------------------------------------------------------------------

HALVES = (torch.arange(N) >= 6).long()[None]  # two objects of 6 patches


def counted_halves():
    same, labelled = label_pairs(HALVES)
    return same, labelled & pairs.distance_strata(GRID)["all"]


def auroc_of(bias, same, counts):
    return pairs.auroc(pairs.rank(-bias.flatten(2)), same.flatten(1)[:, None], counts.flatten(1)[:, None]).item()


def test_attention_to_itself_alone_has_no_distance_and_no_entropy():
    identity = torch.eye(N).double()[None, None]
    assert pairs.attention_distance(identity, GRID).item() == 0
    assert pairs.attention_entropy(identity).item() == 0


def test_uniform_attention_gives_chance_everywhere():
    uniform = torch.full((1, 1, N, N), 1 / N, dtype=torch.float64)
    same, counts = counted_halves()
    assert pairs.attention_entropy(uniform).item() == pytest.approx(math.log(N))
    assert pairs.attention_distance(uniform, GRID).item() == pytest.approx(pairs.distances(GRID).mean().item())
    assert pairs.same_label_lift(uniform, same, counts).item() == pytest.approx(1)
    assert pairs.grouping_index(uniform, same, counts).item() == pytest.approx(0)


def test_attention_within_objects_has_the_inverse_share_as_lift():
    """Each patch attends to its own object alone: 5 of 11 pairs are same, so the lift is 11/5 and the index 1."""
    same, counts = counted_halves()
    block = same[:, None].double() / 6
    assert pairs.same_label_lift(block, same, counts).item() == pytest.approx(11 / 5)
    assert pairs.grouping_index(block, same, counts).item() == pytest.approx(1)
    across = (~same)[:, None].double() / 6
    assert pairs.same_label_lift(across, same, counts).item() == 0
    assert pairs.grouping_index(across, same, counts).item() == pytest.approx(-1)


def test_a_bias_against_other_objects_is_perfect_with_one_sign_and_worst_with_the_other():
    """The distance 1[different object] marks objects with minus; added with plus it sends attention away from them."""
    same, counts = counted_halves()
    bias = (~same)[:, None].double()
    assert auroc_of(bias, same, counts) == 1
    assert auroc_of(-bias, same, counts) == 0
    assert torch.isnan(pairs.separation(bias, same, counts)).all()  # no spread to hold the gap against


def test_a_constant_bias_says_nothing():
    same, counts = counted_halves()
    for value in (0.0, 0.1):  # 0.1 is no binary fraction, so its means round
        constant = torch.full((1, 1, N, N), value, dtype=torch.float64)
        assert auroc_of(constant, same, counts) == 0.5
        assert pairs.separation(constant, same, counts).item() == 0
        apart = pairs.distances(GRID)
        features = pairs.feature_distance(torch.randn(1, N, 4, dtype=torch.float64))
        assert torch.isnan(pairs.partial_correlation(constant, features, apart, apart > 0)).all()


def test_a_random_bias_is_at_chance():
    labels = torch.randint(0, 2, (200, N))
    same, labelled = label_pairs(labels)
    counts = labelled & pairs.distance_strata(GRID)["all"]
    bias = torch.randn(200, 1, N, N, dtype=torch.float64)
    found = pairs.auroc(pairs.rank(-bias.flatten(2)), same.flatten(1)[:, None], counts.flatten(1)[:, None])
    assert found.nanmean().item() == pytest.approx(0.5, abs=0.01)  # standard error about 0.0035
    assert pairs.separation(bias, same, counts).nanmean().item() == pytest.approx(0, abs=0.05)


def test_separation_of_two_gaussians_is_their_distance_in_standard_deviations():
    grid = (20, 20)
    labels = torch.randint(0, 2, (1, 400))
    same, labelled = label_pairs(labels)
    counts = labelled & pairs.distance_strata(grid)["all"]
    bias = 0.5 * torch.randn(1, 1, 400, 400, dtype=torch.float64) + 0.75 * (~same)[:, None]
    assert pairs.separation(bias, same, counts).item() == pytest.approx(1.5, abs=0.02)  # 160,000 pairs


def test_one_label_alone_leaves_the_comparisons_undefined():
    same, labelled = label_pairs(torch.zeros(1, N, dtype=torch.long))
    counts = labelled & pairs.distance_strata(GRID)["all"]
    bias = torch.randn(1, 1, N, N, dtype=torch.float64)
    assert math.isnan(auroc_of(bias, same, counts))
    assert torch.isnan(pairs.separation(bias, same, counts)).all()


def test_a_bias_of_distance_alone_has_no_partial_correlation_with_features():
    """Smooth features go with distance, and so does the bias; with distance held fixed nothing is left."""
    apart = pairs.distances(GRID)
    features = pairs.feature_distance(torch.randn(1, N, 4, dtype=torch.float64)) + 0.3 * apart
    noisy = (apart + 0.3 * torch.randn(4000, 1, N, N, dtype=torch.float64)).mean(0, keepdim=True)
    plain = torch.corrcoef(torch.stack([noisy[0, 0][apart > 0], features[0][apart > 0]]))[0, 1]
    assert plain > 0.3
    assert abs(pairs.partial_correlation(noisy, features, apart, apart > 0).item()) < 0.25  # noise of 132 pairs
    exact = pairs.partial_correlation(2 * apart[None, None], features, apart, apart > 0)
    assert torch.isnan(exact).all()  # nothing but distance: nothing is left to correlate


# --- rows of a model -------------------------------------------------------------------------------------------------


def small(encoding, **changes):
    settings = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "num_heads": 3}
    return create_model("vit_nano", encoding=encoding, **(settings | changes)).eval()


def find(rows, **conditions):
    """At least one row."""
    found = [row for row in rows if all(row.get(key) == value for key, value in conditions.items())]
    assert found
    return found


def test_rows_of_a_model_are_per_layer_and_say_what_they_were_measured_on():
    rows = list(grouping(small("ape+sape2"), labelled_images(6), limit=4))
    assert {row["layer"] for row in rows} == {1, 2}
    assert {row.get("masks") for row in rows} == {None, "scenes"}
    assert all(row["n"] <= 4 and row["measure"] == "grouping" and "chance" in row for row in rows)
    assert all("out of distribution" in row["protocol"] for row in find(rows, masks="scenes"))
    (entropy,) = (row for row in find(rows, name="attention_entropy", layer=1) if "head" not in row)
    assert entropy["maximum"] == pytest.approx(math.log(16))
    assert entropy["ci_low"] <= entropy["value"] <= entropy["ci_high"]
    heads = [row["head"] for row in find(rows, name="attention_distance", layer=2) if "head" in row]
    assert heads == [1, 2, 3]
    names = {row["name"] for row in rows}
    assert {"bias_auroc", "bias_separation", "bias_feature_correlation"} <= names


def test_the_two_signs_of_the_bias_add_up_to_one():
    rows = list(grouping(small("sape2"), labelled_images(6), limit=3))
    for minus in find(rows, name="bias_auroc", sign="minus", layer=1, distance="far"):
        (plus,) = find(rows, name="bias_auroc", sign="plus", layer=1, distance="far", masks=minus["masks"])
        assert minus["value"] + plus["value"] == pytest.approx(1)


def test_a_model_without_bias_has_rows_of_attention_only():
    names = {row["name"] for row in grouping(small("rope"), labelled_images(6), limit=2)}
    assert names == {"attention_distance", "attention_entropy", "same_label_lift", "grouping_index"}


def test_numbers_do_not_depend_on_the_batch_size_and_leave_the_mode_alone():
    model, data = small("sape2").train(), labelled_images(6)
    one, other = (list(grouping(model, data, limit=5, batch_size=size)) for size in (2, 5))
    assert model.training
    assert [row["name"] for row in one] == [row["name"] for row in other]
    for a, b in zip(one, other, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-3)  # float32 rounds otherwise in other batches


def test_what_a_layer_is_seen_to_do_is_what_the_model_does():
    """Against the model's own maps: prefix tokens dropped, rows scaled to 1, tokens in and out."""
    model, batch = small("ape+sape2", num_registers=1), torch.randn(2, 3, 16, 8)
    maps = model.maps(batch)
    first, second = layers_of(model, batch)
    assert first.grid == second.grid == (4, 2)
    torch.testing.assert_close(first.entering, model.embed(batch)[0][:, 2:].double())
    expected = maps[1]["attention"][:, :, 2:, 2:].double()
    torch.testing.assert_close(second.attention, expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(first.leaving, second.entering)
    torch.testing.assert_close(second.leaving, maps[1]["tokens"][:, 2:].double())
    torch.testing.assert_close(first.attention.sum(-1), torch.ones(2, 3, 8).double())


def test_the_class_token_changes_no_number():
    """A class token that takes half of the attention: the rest is scaled back, so every number stays."""
    attention = random_attention(1, 1)

    class Given(torch.nn.Module):
        def __init__(self, with_class):
            super().__init__()
            self.num_prefix_tokens = int(with_class)
            full = torch.full((1, 1, N + 1, N + 1), 0.5, dtype=torch.float64)
            full[:, :, 1:, 1:] = attention / 2
            self.weights = torch.nn.Parameter(full if with_class else attention)

        def embed(self, images):
            return torch.zeros(len(images), N + self.num_prefix_tokens, 4), GRID

        def maps(self, images):
            weights = self.weights.expand(len(images), -1, -1, -1)
            return [{"attention": weights, "tokens": self.embed(images)[0]}]

    data = ImageData(
        torch.randint(0, 256, (1, 3, 6, 8), dtype=torch.uint8), torch.zeros(1).long(), ("a",), (0.5,) * 3, (1.0,) * 3
    )
    without, with_class = (list(grouping(Given(kind), data, limit=1)) for kind in (False, True))
    for a, b in zip(without, with_class, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-12)


def test_a_model_that_cannot_be_looked_into_is_refused():
    with pytest.raises(ValueError, match=r"grouping .*Linear"):
        mapped(torch.nn.Linear(2, 2), "grouping")


def test_a_grid_of_one_patch_has_no_pairs_to_correlate():
    model = create_model("vit_nano", encoding="sape2", image_size=4, patch_size=4, num_classes=5, depth=1)
    rows = {row["name"]: row for row in grouping(model, labelled_images(3, size=4)) if "head" not in row}
    assert rows["bias_feature_correlation"]["value"] is None
    assert rows["attention_distance"]["value"] == 0
