"""The search for scales and codebooks against definitions, brute force, and each codebook alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.codebook import Family
from dybit.tensors.scale_search import choose_reach, choose_scales

TYPES = ["fp32", "bf16", "pow2", "e4m3"]
E2M = {bits: f"e2m{bits - 3}" for bits in range(3, 9)}


def samples():
    """Matrices whose rows are hard in different ways."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows, columns):
        return torch.randn(rows, columns, generator=generator)

    outlier = normal(40, 16)
    outlier[:, 3] = 3e38
    one_hot = torch.zeros(40, 16)
    one_hot[torch.arange(40), torch.arange(40) % 16] = normal(40, 1)[:, 0]
    return {
        "normal": normal(300, 32),
        "short": normal(300, 3),
        "tails": normal(300, 16) ** 5,
        "positive": normal(100, 16).abs(),
        "integers": torch.randint(-8, 9, (300, 16), generator=generator).float(),
        "bfloat16": normal(200, 24).bfloat16().float(),
        "constant": torch.full((4, 8), 0.3),
        "zero": torch.zeros(3, 8),
        "one_hot": one_hot,
        "outlier": outlier,
        "huge": (normal(40, 16) * 1e38).clamp(-3.4e38, 3.4e38),
        "tiny": normal(40, 16) * 1e-37,
        "denormal": normal(40, 16) * 1e-41,
    }


SAMPLES = samples()
each_sample = pytest.mark.parametrize("x", SAMPLES.values(), ids=SAMPLES)


def errors(x, scales, family, group_size=None, importance=None):
    """Squared error of every group in float64, by the exact encoder: (rows, groups). Fails if a value overflows."""
    width = group_size or x.shape[1]
    scale = scales.scale.numpy().astype(np.float64)
    choice = np.zeros(scale.shape, int) if scales.choice is None else scales.choice.numpy()

    def spread(units):
        wide = np.repeat(units, width, axis=1)[:, : x.shape[1]] if units.shape[1] > 1 else units
        return np.broadcast_to(wide, x.shape)

    scale, choice, value = spread(scale), spread(choice), np.empty(x.shape)
    data = x.numpy().astype(np.float64)
    for index in np.unique(choice):
        book, mask = family.books[index], choice == index
        with np.errstate(over="ignore"):  # infinities saturate
            value[mask] = book.values[book.encode((data[mask] / scale[mask]).astype(np.float32))]
    result = value * scale
    assert np.isfinite(result.astype(np.float32)).all()
    square = (data - result) ** 2 * (1.0 if importance is None else importance.numpy().astype(np.float64))
    starts = np.arange(0, x.shape[1], width)
    return np.add.reduceat(square, starts, axis=1)


def alone(book, family):
    return Family(book.name, (book,), family.scale, family.group_size)


@each_sample
@pytest.mark.parametrize(
    ("name", "scale_type"),
    [(name, "fp32") for name in ("dybit2", "dybit3", "int4asym", "ant4", "udybit4")]
    + [("dybit4", scale_type) for scale_type in ("fp32", "bf16", "pow2")],
)
def test_a_choice_is_never_worse_than_any_codebook_alone(x, name, scale_type):
    family = catalogue.family(name)
    together = errors(x, choose_scales(x, family, scale_type=scale_type), family)
    energy = (x.double().numpy() ** 2).sum(1, keepdims=True)
    for book in family.books[:: 5 if len(family.books) > 9 else 1]:
        one = alone(book, family)
        single = errors(x, choose_scales(x, one, scale_type=scale_type), one)
        # float32's own rounding of the errors, where they are next to nothing
        assert (together <= single * (1 + 1e-5) + 1e-12 * energy).all(), book.name


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_a_choice_is_never_worse_with_importance(granularity):
    x, h = SAMPLES["normal"], torch.rand(300, 32) ** 4 + 1e-3
    family, size = catalogue.family("dybit4"), 5 if granularity == "group" else None
    options = dict(granularity=granularity, group_size=size, importance=h)
    together = errors(x, choose_scales(x, family, **options), family, size, h)
    for book in family.books:
        one = alone(book, family)
        # Importance has a floor of a millionth of its mean.
        assert (together <= errors(x, choose_scales(x, one, **options), one, size, h) * (1 + 1e-4) + 1e-6).all()


@pytest.mark.parametrize("bits", range(3, 9))
@each_sample
def test_max_run_is_never_worse_than_its_relatives(bits, x):
    plain = catalogue.dybit(bits, kind="plain")
    energy = (x.double().numpy() ** 2).sum(1, keepdims=True)
    together = errors(x, choose_scales(x, plain), plain)
    for name in (f"int{bits}", E2M[bits], f"flint{bits}"):
        rival = catalogue.family(name)
        assert (together <= errors(x, choose_scales(x, rival), rival) * (1 + 1e-5) + 1e-12 * energy).all(), name


def test_max_run_at_two_bits_is_int():
    x = SAMPLES["normal"]
    plain, rival = catalogue.dybit(2, kind="plain"), catalogue.family("int2")
    assert np.array_equal(errors(x, choose_scales(x, plain), plain), errors(x, choose_scales(x, rival), rival))


def brute_force(x, book):
    """The least squared error of each row over 300 scales, in float64."""
    x = x.numpy().astype(np.float64)
    levels = book.levels
    top = np.abs(x).max(1, keepdims=True)
    best = np.full(len(x), np.inf)
    magnitudes = np.unique(np.abs(levels))
    reaches = np.geomspace(magnitudes[len(magnitudes) // 2], magnitudes[-1] / 0.3, 300)
    signs = (1, -1) if not book.symmetric and levels[0] < 0 else (1,)
    for reach in [*reaches, magnitudes[-1]]:
        for sign in signs:
            ratio = x * (sign * reach / top)
            value = levels[np.searchsorted(book.midpoints, ratio)]
            best = np.minimum(best, ((x - value * (sign * top / reach)) ** 2).sum(1))
    return best


# From 6 bits on the error of a short row is jagged: the best of 300 scales is a lucky one. Of long rows one scale is
# refined, of short ones 30 are tried.
ALLOWED = {
    512: {2: 1.01, 3: 1.01, 4: 1.01, 5: 1.03, 6: 1.04, 7: 1.06, 8: 1.1},
    128: {2: 1.01, 3: 1.01, 4: 1.01, 5: 1.03, 6: 1.03, 7: 1.05, 8: 1.08},
    32: {2: 1.01, 3: 1.01, 4: 1.01, 5: 1.03, 6: 1.05, 7: 1.1, 8: 1.12},
}
SEARCHED = {2: ["s2", "s2mid", "int2full", "nf2", "u2"]} | {
    bits: [
        f"s{bits}",
        f"s{bits}r1",
        f"s{bits}r2mid",
        f"s{bits}r2spare",
        f"u{bits}",
        f"int{bits}full",
        f"nf{bits}",
        f"posit{bits}es1",
        f"pot{bits}",
        f"apot{bits}",
        f"flint{bits}",
    ]
    for bits in range(3, 9)
}


@pytest.mark.parametrize(("bits", "name"), [(bits, name) for bits, names in SEARCHED.items() for name in names])
def test_error_is_close_to_brute_force(bits, name):
    family = catalogue.family(name)
    for columns, allowed in ALLOWED.items():
        x = torch.randn(3072 // columns, columns)
        if not family.books[0].levels[0] < 0:
            x = x.abs()
        found = errors(x, choose_scales(x, family), family)[:, 0]
        assert found.sum() <= allowed[bits] * brute_force(x, family.books[0]).sum(), columns


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("tail", [0, 7])
def test_groups_are_searched_one_by_one(bits, tail):
    x = torch.randn(6, 4 * 16 + tail)
    family = catalogue.dybit(bits)
    together = choose_scales(x, family, granularity="group", group_size=16)
    assert together.scale.shape == together.choice.shape == (6, 4 + bool(tail))
    for group, part in enumerate(x.split(16, dim=1)):
        one = choose_scales(part, family)
        assert torch.equal(one.scale[:, 0], together.scale[:, group])
        assert torch.equal(one.choice[:, 0], together.choice[:, group])
    assert together.error == pytest.approx(errors(x, together, family, 16).sum(), rel=1e-5)


def test_a_group_wider_than_the_row_is_the_row():
    x = torch.randn(4, 10)
    family = catalogue.dybit(4)
    assert torch.equal(
        choose_scales(x, family, granularity="group", group_size=64).scale, choose_scales(x, family).scale
    )


def test_large_matrices_are_searched_in_blocks():
    x = torch.randn(40, 20_000)
    whole = choose_scales(x, catalogue.family("s4"))
    rows = torch.cat([choose_scales(row[None], catalogue.family("s4")).scale for row in x[[0, 20, 39]]])
    assert torch.equal(whole.scale[[0, 20, 39]], rows)


@pytest.mark.parametrize("choice", ["tensor", "channel", "group"])
def test_choice_granularity(choice):
    x = torch.randn(12, 48)
    x[:4] = x[:4] ** 3
    family = catalogue.dybit(4)
    result = choose_scales(x, family, granularity="group", group_size=16, choice_granularity=choice)
    assert result.scale.shape == result.choice.shape == (12, 3)
    assert result.error == pytest.approx(errors(x, result, family, 16).sum(), rel=1e-5)
    if choice == "channel":
        assert bool((result.choice == result.choice[:, :1]).all())
    if choice == "tensor":
        assert len(result.choice.unique()) == 1
    # It is the best single codebook for what shares it.
    singles = np.stack(
        [
            errors(x, choose_scales(x, one, granularity="group", group_size=16), one, 16)
            for one in (alone(book, family) for book in family.books)
        ]
    )
    axes = {"tensor": (1, 2), "channel": (2,), "group": ()}[choice]
    best = singles.sum(axis=axes).min(axis=0).sum()
    assert result.error == pytest.approx(best, rel=1e-5)


def test_tensor_granularity():
    x = torch.randn(30, 40)
    family = catalogue.dybit(3)
    result = choose_scales(x, family, granularity="tensor")
    assert result.scale.shape == result.choice.shape == (1, 1)
    flat = choose_scales(x.reshape(1, -1), family)
    assert result.error == pytest.approx(flat.error, rel=1e-3)


@each_sample
@pytest.mark.parametrize("scale_type", TYPES)
@pytest.mark.parametrize("method", ["mse", "absmax", "percentile"])
def test_scales_are_what_their_type_holds(x, scale_type, method):
    for name in ("dybit4", "s4r2mid", "int4full", "u4"):
        family = catalogue.family(name)
        result = choose_scales(x, family, scale_type=scale_type, method=method)
        scale = result.scale
        assert scale.dtype == torch.float32
        assert bool(torch.isfinite(scale).all()) and bool((scale != 0).all())
        if scale_type == "bf16":
            assert torch.equal(scale.bfloat16().float(), scale)
        elif scale_type == "pow2":
            mantissa, exponent = torch.frexp(scale)
            assert bool((mantissa.abs() == 0.5).all())
            assert int(exponent.min()) - 1 >= -64 and int(exponent.max()) - 1 <= 63
        elif scale_type == "e4m3":
            stored = (scale / result.tensor_scale).to(torch.float8_e4m3fn).float()
            assert torch.equal(stored * result.tensor_scale, scale)
        if scale_type != "e4m3":
            assert result.tensor_scale == 1.0
        chosen = np.zeros(scale.shape, int) if result.choice is None else result.choice.numpy()
        symmetric = np.array([book.symmetric or book.levels[0] >= 0 for book in family.books])[chosen]
        assert not ((scale.numpy() < 0) & symmetric).any()
        errors(x, result, family)  # no level overflows


FAMILIES = sorted(
    {family.name for bits in range(2, 9) for signed in (True, False) for family in catalogue.families(bits, signed)}
    | {"int4z0", "int4z3", "int4z15", "s4r1spare", "s2spare", "dybit5mid"}
)
SIZES = [1.0, 3e-42, 1e-37, 1e-20, 1e-6, 3e5, 1e20, 1e30, 3e38]


@st.composite
def matrices(draw):
    """Rows of one sign, constant, zero, with one element, of integers, or normal; each of its own magnitude."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    columns, common, rows = draw(st.integers(1, 20)), draw(st.sampled_from(SIZES)), []
    for _ in range(draw(st.integers(1, 4))):
        row = torch.randn(columns, generator=generator).clamp(-4, 4) / 4
        kind = draw(
            st.sampled_from(["normal", "positive", "negative", "constant", "minus", "zero", "single", "integer"])
        )
        if kind in ("positive", "negative"):
            row = row.abs() if kind == "positive" else -row.abs()
        elif kind in ("constant", "minus"):
            row = torch.full_like(row, 0.3 if kind == "constant" else -0.3)
        elif kind in ("zero", "single"):
            row[kind == "single" :] = 0
        elif kind == "integer":
            row = (8 * row).round() / 8
        rows.append(row * (common if draw(st.booleans()) else draw(st.sampled_from(SIZES))))
    return torch.stack(rows)


@settings(max_examples=100)
@given(matrices(), st.sampled_from(FAMILIES), st.sampled_from(TYPES), st.sampled_from(["tensor", "channel", 1, 5]))
def test_every_method_is_finite_and_not_worse_than_a_simpler_one(x, name, scale_type, shared):
    family, size = catalogue.family(name), shared if isinstance(shared, int) else None
    options = dict(granularity="group" if size else shared, group_size=size, scale_type=scale_type)
    energy = (x.double().numpy() ** 2).sum()

    def judged(**method):
        scales = choose_scales(x, family, **options, **method)
        assert bool(torch.isfinite(scales.scale).all()) and bool((scales.scale != 0).all())
        error = errors(x, scales, family, size).sum()
        least = 1e-36 if scale_type == "pow2" else 1e-70  # of a codebook without zero at the smallest scale
        assert scales.error == pytest.approx(error, rel=1e-3, abs=1e-10 * energy + least)
        return error

    absmax, unclipped = judged(method="absmax"), judged(method="percentile", percentile=100)
    assert judged(method="percentile") == unclipped == pytest.approx(absmax, rel=1e-5)
    # Small units beside a large one have fewer E4M3 numbers where the large one's best scale is larger.
    assert judged(method="mse") <= absmax * (1 + 1e-5) + (1e-6 if scale_type == "e4m3" else 1e-11) * energy
    judged(method="percentile", percentile=50)
    choose_scales(x, family, **options, importance=torch.rand(x.shape[1]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "asym" in name or "z" in name])
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_points_at_the_ends_serve_units_of_one_sign(name, sign):
    x = sign * (torch.rand(50, 12) + 0.5)
    family = catalogue.family(name)
    result = choose_scales(x, family, method="absmax")
    levels = 2 ** family.books[0].bits - 1
    step = (x.abs().amax(1, keepdim=True) / levels).numpy()
    if "asym" in name:
        assert (errors(x, result, family) <= (step / 2) ** 2 * 12 * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["s4", "s8", "posit4es1", "posit8es0", "nf4", "int4asym", "dybit4spare", "nvfp4"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_e4m3_scales_reach_to_the_best_scale_of_a_tapered_format(name, granularity):
    x, family = torch.randn(16, 256), catalogue.family(name)
    exact = choose_scales(x, family, granularity=granularity).error
    assert choose_scales(x, family, granularity=granularity, scale_type="e4m3").error < 1.3 * exact


def test_e4m3_factors_of_tiny_tensors_are_normal_numbers():
    x = torch.randn(4, 16) * 1e-36
    result = choose_scales(x, catalogue.family("int4"), scale_type="e4m3")
    assert float(result.scale.abs().min()) >= 2.0**-126 and result.tensor_scale >= 2.0**-117
    assert result.error < 0.05 * float(x.double().square().sum())
    assert choose_scales(torch.zeros(2, 4), catalogue.family("int4"), scale_type="e4m3").tensor_scale == 1


def test_negative_scales_are_used_by_the_spare_level():
    x = torch.randn(200, 16)
    scale = choose_scales(x, catalogue.dybit(3, kind="spare")).scale
    assert 0.3 < float((scale < 0).float().mean()) < 0.7


@pytest.mark.parametrize("name", ["dybit4", "s4", "nf4", "int4asym", "u4"])
@pytest.mark.parametrize("scale_type", ["fp32", "bf16", "pow2"])
def test_an_all_zero_unit_gets_scale_one_and_a_zero(name, scale_type):
    x = torch.randn(3, 20)
    x[1] = 0
    x[2, 8:16] = 0
    family = catalogue.family(name)
    for granularity, size in (("channel", None), ("group", 8)):
        result = choose_scales(x, family, granularity=granularity, group_size=size, scale_type=scale_type)
        assert bool((result.scale[1] == 1).all())
        assert errors(x, result, family, size)[1].sum() == 0
        if size:
            assert result.scale[2, 1] == 1
    assert choose_scales(torch.zeros(2, 4), family, granularity="tensor", scale_type=scale_type).scale.item() == 1


def test_an_all_zero_unit_without_a_zero_gets_the_smallest_scale():
    for scale_type, smallest in (("fp32", 2.0**-126), ("pow2", 2.0**-64)):
        result = choose_scales(torch.zeros(1, 4), catalogue.family("s2mid"), scale_type=scale_type)
        assert result.scale.item() == smallest


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["dybit{}", "s{}", "dybit{}mid"])
def test_exactly_representable_rows_have_no_error(bits, name):
    for book in catalogue.family(name.format(bits)).books:
        x = torch.tensor(np.stack([book.levels, book.levels[::-1]]) * 0.75, dtype=torch.float32)
        family = alone(book, catalogue.family(name.format(bits)))
        assert errors(x, choose_scales(x, family), family).max() <= 1e-10 * float(x.square().sum())


@pytest.mark.parametrize("name", ["s4", "s4r1", "nf4", "u4", "int4full", "s4r2spare", "e2m1"])
def test_absmax_clips_nothing(name):
    family = catalogue.family(name)
    book = family.books[0]
    x = torch.randn(50, 20)
    if book.levels[0] >= 0:
        x = x.abs()
    high, low = float(book.levels[-1]), float(-book.levels[0])
    scale = choose_scales(x, family, method="absmax").scale[:, 0].double().numpy()
    top, bottom = x.amax(1).double().numpy(), -x.amin(1).double().numpy()
    positive = np.maximum(top / high, bottom / low) if low > 0 else top / high
    negative = np.maximum(bottom / high, top / low) if low > 0 else positive
    allowed = np.stack([positive, -negative])
    if book.symmetric or low <= 0:
        assert np.allclose(scale, positive, rtol=1e-6)
    else:
        assert (np.abs(allowed / scale - 1) < 1e-6).any(0).all()
    ratio = x.double().numpy() / scale[:, None]
    assert ratio.max() <= high * (1 + 1e-6) and ratio.min() >= -low * (1 + 1e-6)


@pytest.mark.parametrize("percentile", [50, 90, 99.99, 100, 1e-3])
def test_percentile_is_the_nearest_rank(percentile):
    x = torch.randn(20, 100)
    family = catalogue.family("int4")
    magnitudes = np.sort(x.abs().numpy(), axis=1)
    rank = max(1, int(np.ceil(percentile / 100 * 100)))
    result = choose_scales(x, family, method="percentile", percentile=percentile)
    assert np.allclose(result.scale[:, 0].numpy(), magnitudes[:, rank - 1] / 7, rtol=1e-6)
    pooled = choose_scales(x, family, method="percentile", percentile=percentile, granularity="tensor")
    rank = max(1, int(np.ceil(percentile / 100 * 2000)))
    assert pooled.scale.item() == pytest.approx(np.sort(magnitudes.flatten())[rank - 1] / 7, rel=1e-6)


def test_percentile_of_mostly_zeros_is_finite():
    x = torch.zeros(2, 100)
    x[:, 0] = 5
    result = choose_scales(x, catalogue.family("s4"), method="percentile", percentile=50)
    assert bool((result.scale > 0).all())


def test_importance_lowers_the_weighted_error():
    x = torch.randn(64, 48)
    for h in (torch.rand(48) ** 6, torch.rand(64, 48) ** 6, torch.rand(1, 48) ** 6 * 1e37, torch.rand(48) * 1e-30):
        for name in ("s3", "dybit4"):
            family = catalogue.family(name)
            unit = h / h.max()
            plain = errors(x, choose_scales(x, family), family, None, unit).sum()
            weighted = errors(x, choose_scales(x, family, importance=h), family, None, unit).sum()
            assert weighted < 0.98 * plain


def test_equal_importance_changes_nothing():
    x = torch.randn(32, 48)
    family = catalogue.dybit(4)
    plain = errors(x, choose_scales(x, family), family).sum()
    same = errors(x, choose_scales(x, family, importance=torch.full((48,), 7.0)), family).sum()
    assert same == pytest.approx(plain, rel=1e-3)


def test_importance_of_zero_gives_usable_scales():
    x = torch.randn(4, 16)
    h = torch.ones(4, 16)
    h[2] = 0
    result = choose_scales(x, catalogue.dybit(4), importance=h)
    assert float(result.scale[2].abs()) > 0.01
    assert bool(torch.isfinite(choose_scales(x, catalogue.dybit(4), importance=torch.zeros(16)).scale).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types(dtype):
    x = torch.randn(8, 16).to(dtype)
    family = catalogue.dybit(4)
    assert torch.equal(choose_scales(x, family).scale, choose_scales(x.float(), family).scale)


def test_is_deterministic_and_leaves_the_matrix():
    x = torch.randn(8, 16)
    before = x.clone()
    first, second = (choose_scales(x, catalogue.dybit(4), granularity="group", group_size=5) for _ in range(2))
    assert torch.equal(first.scale, second.scale) and torch.equal(first.choice, second.choice)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": torch.zeros(3)}, "of shape (3,)"),
        ({"matrix": torch.zeros(0, 3)}, "of shape (0, 3)"),
        ({"matrix": torch.zeros(3, 0)}, "of shape (3, 0)"),
        ({"matrix": torch.zeros(2, 2, dtype=torch.int32)}, "is torch.int32"),
        ({"granularity": "row"}, "granularity must be one of tensor, channel, group, not 'row'"),
        ({"choice_granularity": "row"}, "or 'row'"),
        ({"granularity": "tensor", "choice_granularity": "channel"}, "choice_granularity='channel' is finer"),
        ({"granularity": "group"}, "group_size=None does not fit granularity='group'"),
        ({"group_size": 4}, "group_size=4 does not fit granularity='channel'"),
        ({"granularity": "group", "group_size": 0}, "group_size=0"),
        ({"method": "best"}, "method must be one of mse, absmax, percentile, not 'best'"),
        ({"percentile": 0}, "percentile must be above 0 and at most 100, not 0"),
        ({"percentile": 101}, "not 101"),
        ({"percentile": float("nan")}, "not nan"),
        ({"importance": torch.ones(7)}, "importance must have shape (8,) or (4, 8), not (7,)"),
        ({"importance": torch.ones(3, 8)}, "not (3, 8)"),
        ({"importance": torch.ones(1, 4, 8)}, "not (1, 4, 8)"),
        ({"importance": -torch.ones(8)}, "importance must be finite and at least 0"),
        ({"importance": torch.full((8,), float("nan"))}, "importance must be finite and at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    values = {"matrix": torch.ones(4, 8), **arguments}
    with pytest.raises(DyBitError) as error:
        choose_scales(values.pop("matrix"), catalogue.dybit(4), **values)
    assert message in str(error.value)


def test_choose_reach():
    rows = torch.randn(64, 64)
    for family in (catalogue.dybit(4, kind="plain"), catalogue.dybit(8, kind="plain")):
        book, reach = choose_reach(rows, family)

        def error(book, reach):
            x = rows.double().numpy()
            scale = np.abs(x).max(1, keepdims=True) / reach
            return ((x - scale * book.decode(book.encode(x / scale))) ** 2).sum()

        best = error(book, reach)
        for other in family.books:
            assert best <= error(other, float(other.levels[-1])) * (1 + 1e-6)
    assert choose_reach(torch.zeros(3, 4), catalogue.dybit(4))[1] > 0


@pytest.mark.parametrize("factor", [2.0**-120, 2.0**-60, 2.0**100, 2.0**120])
def test_the_reach_does_not_depend_on_the_magnitude(factor):
    rows = torch.randn(64, 64)
    assert choose_reach(rows * factor, catalogue.dybit(8)) == choose_reach(rows, catalogue.dybit(8))
