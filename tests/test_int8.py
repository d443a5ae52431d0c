"""The encoder in integers says what it says in floating point, but for rounding."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from copydesk import int8
from copydesk.bert import Bert, BertSettings
from copydesk.int8 import Int8Linear, Scale, measured, quantize
from copydesk.predictor import choose_precision
from copydesk.ragged import TokenRows

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="torch has no operators of oneDNN on this processor"
)
SETTINGS = BertSettings(
    model_type="bert",
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=16,
)


def make_encoder() -> Bert:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Bert(SETTINGS).eval().requires_grad_(requires_grad=False)


def make_rows(count: int = 40) -> TokenRows:
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 17, (count,), generator=random).tolist()
    return TokenRows.of([torch.randint(1, 50, (length,), generator=random).tolist() for length in lengths])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_those_of_floating_point_but_for_a_hundredth(dtype):
    encoder = make_encoder()
    rows = make_rows()
    expected = encoder(rows)
    with measured(encoder) as ranges:
        encoder(rows)

    quantize(encoder, ranges)
    found = encoder.to(dtype)(rows)

    assert found.dtype == dtype
    apart = (found.float() - expected).norm() / expected.norm()
    assert 0 < apart < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_out_the_same_in_any_company(dtype):
    encoder = make_encoder()
    rows = make_rows()
    with measured(encoder) as ranges:
        encoder(rows)
    quantize(encoder, ranges)
    encoder.to(dtype)

    together = encoder(rows).split(rows.lengths.tolist())

    for i, row in enumerate(together):
        assert torch.equal(encoder(rows.take(torch.tensor([i]))), row)


def test_ranges_cover_all_that_was_read_within_the_context_alone():
    encoder = make_encoder()
    rows = make_rows()
    with measured(encoder) as ranges:
        encoder(rows.take(torch.arange(20)))
        encoder(rows.take(torch.arange(20, 40)))
    x = encoder.embeddings(rows.ids, rows.positions)

    assert len(ranges) == 3
    widths = torch.tensor(ranges[0].widths["attention"])
    torch.testing.assert_close(widths, x.abs().amax(dim=0) ** 0.75, rtol=0.05, atol=0)
    assert ranges[0].attention == pytest.approx(((x / widths).min().item(), (x / widths).max().item()))
    assert ranges[0].inner[0] == pytest.approx(-0.17, abs=0.01)  # GELU has no lower value
    assert set(ranges[0].widths) == {"attention", "attended", "feed"}
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_ranges_of_an_encoder_that_is_not_ours_are_not_known():
    with measured(nn.Linear(3, 4)) as ranges:
        pass
    with measured(make_encoder()) as unread:
        pass

    assert ranges == []
    assert unread == []


@pytest.mark.parametrize("values", [(-2.0, 6.0), (0.5, 3.0), (-3.0, -1.0)])
def test_numbers_are_rounded_to_the_nearest_step_and_cut_off_at_the_ends(values):
    scale = Scale.of(values)
    x = torch.linspace(-10, 10, 1_001)

    integers = scale.integers(x)

    assert integers.dtype == torch.uint8
    back = scale.step * (integers.double() - scale.zero)
    low, high = min(values[0], 0.0), max(values[1], 0.0)
    assert (back - x.clamp(low, high)).abs().max() <= scale.step * 0.51
    assert scale.integers(torch.zeros(1)).item() == scale.zero


def test_the_range_of_nothing_has_a_scale():
    assert Scale.of((0.0, 0.0)).integers(torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("greatest", sorted({63, int8.greatest_weight()}))
def test_a_projection_multiplies_the_rounded_numbers_exactly(greatest, monkeypatch):
    monkeypatch.setattr(int8, "greatest_weight", lambda: greatest)
    random = torch.Generator().manual_seed(0)
    parts = [nn.Linear(32, 16), nn.Linear(32, 24)]
    for part in parts:
        part.weight.data = torch.randn(part.weight.shape, generator=random)
        part.bias.data = torch.randn(part.bias.shape, generator=random)
    x = torch.randn(5, 7, 32, generator=random)
    linear = Int8Linear(parts, (-3.0, 3.0))

    weight, bias = (torch.cat([getattr(part, name).data for part in parts]) for name in ("weight", "bias"))
    steps = weight.abs().amax(dim=1, keepdim=True) / greatest
    rounded = linear.scale.step * (linear.scale.integers(x).float() - linear.scale.zero)
    expected = functional.linear(rounded, (weight / steps).round() * steps, bias)
    torch.testing.assert_close(linear(x, torch.float32), expected, atol=1e-4, rtol=1e-4)
    out = Scale.of((-0.2, 8.0))
    gelu = out.step * (linear.gelu(x, out).float() - out.zero)
    np.testing.assert_allclose(gelu, functional.gelu(expected).clamp(max=8.0), atol=out.step * 0.6)


def test_the_greatest_numbers_are_multiplied_exactly():
    part = nn.Linear(32, 4)
    nn.init.ones_(part.weight)
    nn.init.zeros_(part.bias)

    found = Int8Linear([part], (0.0, 1.0))(torch.ones(1, 32), torch.float32)

    torch.testing.assert_close(found, torch.full((1, 4), 32.0))


@pytest.mark.parametrize(("vnni", "amx", "greatest"), [(True, False, 127), (False, True, 127), (False, False, 63)])
def test_weights_are_half_as_great_where_sums_of_products_would_overflow(vnni, amx, greatest, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: vnni)

    assert int8.greatest_weight() == greatest
    assert int8.is_native() == (vnni or amx)


def test_widths_keep_a_channel_far_wider_than_the_others_from_making_their_steps_wide():
    random = torch.Generator().manual_seed(0)
    x, part = torch.randn(200, 32, generator=random), nn.Linear(32, 24)
    part.weight.data = torch.randn(part.weight.shape, generator=random)
    x[:, 5] *= 20
    widths = x.abs().amax(dim=0) ** 0.75

    def apart(widths: torch.Tensor) -> float:
        values = (x / widths).min().item(), (x / widths).max().item()
        found = Int8Linear([part], values, widths.tolist())(x, torch.float32)
        return ((found - part(x)).norm() / part(x).norm()).item()

    assert apart(widths) < 0.5 * apart(torch.ones(32))


def test_integers_are_chosen_where_they_are_native_and_the_ranges_known(monkeypatch):
    encoder = make_encoder()
    with measured(encoder) as ranges:
        encoder(make_rows())
    cpu = torch.device("cpu")

    monkeypatch.setattr(int8, "is_native", lambda: True)
    assert choose_precision("auto", cpu, ranges) == "int8"
    assert choose_precision("auto", cpu, None) in {"bfloat16", "float32"}
    assert choose_precision("float32", cpu, ranges) == "float32"
    monkeypatch.setattr(int8, "is_native", lambda: False)
    assert choose_precision("auto", cpu, ranges) in {"bfloat16", "float32"}


@pytest.mark.parametrize(
    ("device", "native", "message"),
    [
        ("cpu", True, "the model has no ranges"),
        ("cpu", False, "this processor or this torch does not multiply"),
        ("cuda", True, "for processors, and the device is cuda"),
    ],
)
def test_integers_that_are_not_to_be_had_are_refused(device, native, message, monkeypatch):
    monkeypatch.setattr(int8, "is_native", lambda: native)

    with pytest.raises(ValueError, match=message):
        choose_precision("int8", torch.device(device), None)
