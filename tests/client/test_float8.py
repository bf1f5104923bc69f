"""fp8 records against a search over all codes, one value at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hga_kvd_client.float8 import pack, scale, unpack, widened
from hypothesis import given, settings
from hypothesis import strategies as st

# Every finite value of e4m3, by its byte, as torch has it.
VALUES = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).double().tolist()


def reference(values: list[float]) -> tuple[int, list[set[int]]]:
    """The exponent of the scale, and for every value the bytes that are nearest, its lowest bit given for the first 8."""
    largest = max(map(abs, values))
    exponent = 127
    while exponent > -127 and largest * 2.0**exponent > 464:
        exponent -= 1
    wanted = [(exponent + 128) >> i & 1 for i in range(8)]
    nearest = []
    for i, value in enumerate(values):
        allowed = [b for b in range(256) if not math.isnan(VALUES[b]) and (i > 7 or b & 1 == wanted[i])]
        best = min(abs(VALUES[b] - value * 2.0**exponent) for b in allowed)
        nearest.append({b for b in allowed if abs(VALUES[b] - value * 2.0**exponent) <= best})
    return exponent, nearest


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=40),
    size=st.sampled_from([1e-38, 1e-20, 1e-4, 1.0, 3e3, 1e30]),
)
def test_every_value_is_the_nearest_code(values, size):
    made = torch.tensor(values) * size
    exponent, nearest = reference(made.double().tolist())
    codes = pack(made)
    assert all(code in found for code, found in zip(codes.tolist(), nearest, strict=True))
    assert scale(codes).item() == 2.0**-exponent
    expected = torch.tensor([VALUES[code] for code in codes.tolist()], dtype=torch.float64) * 2.0**-exponent
    torch.testing.assert_close(unpack(codes, torch.float32).double(), expected, rtol=1e-6, atol=1e-45)


def test_shapes_and_errors():
    values = torch.randn(3, 2, 5, 1024) * torch.tensor([1e-3, 1.0, 30.0])[:, None, None, None]
    codes = pack(values)
    assert (codes.shape, codes.dtype) == (values.shape, torch.uint8)
    apart = unpack(codes, torch.float32) - values
    assert (apart.square().sum(3) / values.square().sum(3)).sqrt().max() < 0.03
    for i in ((0, 0, 0), (2, 1, 4)):
        assert torch.equal(codes[i], pack(values[i]))
    assert unpack(codes, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38, -3e38])
def test_the_ends_of_float32(value):
    values = torch.zeros(64)
    values[40] = value
    back = unpack(pack(values), torch.float32)
    assert back.isfinite().all()
    assert back[40] == pytest.approx(value, rel=0.07, abs=2e-40)
    assert back[torch.arange(64) != 40].abs().max() <= max(abs(value) * 2**-16, 1e-40)


def test_widened_is_torchs_cast():
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    finite = (codes & 0x7F) != 0x7F
    assert torch.equal(widened(codes)[finite], codes.view(torch.float8_e4m3fn).float()[finite])
