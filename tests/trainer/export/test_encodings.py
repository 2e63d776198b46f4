"""The encodings of exported weights: exact round trips, error bounds, and bytes worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from shoestring.trainer.export import encodings

floats = st.floats(-1e4, 1e4, width=32)
weights = arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=9), elements=floats)


@given(weights, st.data())
def test_int8_is_within_half_a_step_and_stable(array: np.ndarray, data: st.DataObject) -> None:
    weight = torch.from_numpy(array)
    axis = data.draw(st.integers(0, weight.ndim - 1))
    values, scale = encodings.quantize_int8(weight, axis)
    assert values.dtype == torch.int8 and values.abs().max() <= 127
    assert scale.shape == tuple(n if dim == axis else 1 for dim, n in enumerate(weight.shape))
    back = encodings.dequantize_int8(values, scale)
    assert ((back - weight).abs() <= scale * 0.5001).all()
    assert (back[weight == 0] == 0).all()
    assert torch.equal(encodings.quantize_int8(back, axis)[0], values)


def test_int8_by_hand() -> None:
    values, scale = encodings.quantize_int8(torch.tensor([[1.0, -0.5, 0.004], [0.0, 0.0, 0.0], [-254.0, 3.0, 1.0]]))
    assert values.tolist() == [[127, -64, 1], [0, 0, 0], [-127, 2, 0]]  # 63.5 and 1.5 round to even
    assert scale.flatten().tolist() == pytest.approx([1 / 127, 1.0, 2.0])


@given(weights)
def test_int4_is_within_half_a_step(array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    values, scale = encodings.quantize_int4(weight)
    back = encodings.dequantize_int4(values, scale, tuple(weight.shape))
    steps = scale.float().repeat(1, values.shape[1]).flatten()[: weight.numel()].view(weight.shape)
    # float16 rounds the scale by up to 1/2048, or 2**-25 where it is subnormal: seven steps of it
    assert ((back - weight).abs() <= steps * (0.5 + 7 / 1024) + 7 * 2.0**-24).all()
    packed = encodings.pack_bits(values, 4)
    assert packed.numel() == -(-values.numel() // 2)
    assert torch.equal(encodings.unpack_bits(packed, 4, values.numel()), values.flatten())


@given(st.data(), st.integers(2, 8))
def test_integers_of_any_bits_come_back(data: st.DataObject, bits: int) -> None:
    top = 2 ** (bits - 1)
    array = data.draw(arrays(np.int8, st.integers(0, 40), elements=st.integers(-top, top - 1)))
    packed = encodings.pack_bits(torch.from_numpy(array), bits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-len(array) * bits // 8)
    assert encodings.unpack_bits(packed, bits, len(array)).tolist() == array.tolist()


def test_three_bits_by_hand() -> None:
    # 3 = 011, -1 = 111, -4 = 100, lowest bit first: 110 111 001, cut into bytes and read backwards
    assert encodings.pack_bits(torch.tensor([3, -1, -4]), 3).tolist() == [0b00111011, 0b1]


def test_nibbles_by_hand() -> None:
    # the first in the low half, and an odd one out gets a 0 beside it
    assert encodings.pack_bits(torch.tensor([3, -1, -8]), 4).tolist() == [0xF3, 0x08]


@given(weights, st.integers(2, 8), st.sampled_from(["absmax", "mse"]))
def test_a_grid_is_that_of_training(array: np.ndarray, bits: int, rule: str) -> None:
    from shoestring.callbacks.compression.fake_quantization import quantized

    weight = torch.from_numpy(array)
    grid = encodings.Grid(bits, None, rule)
    assert torch.equal(grid.rounded(weight), quantized(weight, bits, None, rule))


def test_a_codebook_has_few_values() -> None:
    book = encodings.Codebook()
    assert book.values(torch.tensor([[0.5, -1.0], [0.5, -0.0]])).tolist() == [-1.0, 0.0, 0.5]
    with pytest.raises(encodings.CannotEncode, match="300 distinct values, where a codebook has at most 256"):
        book.values(torch.arange(300.0))


@given(arrays(np.bool_, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20)))
def test_masks_come_back(array: np.ndarray) -> None:
    mask = torch.from_numpy(array)
    packed = encodings.pack_mask(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(encodings.unpack_mask(packed, tuple(mask.shape)), mask)


def test_masks_by_hand() -> None:
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1]).bool()
    assert encodings.pack_mask(mask).tolist() == [0b10000001, 0b1]


@given(weights, st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]))
def test_sparse_tensors_come_back(array: np.ndarray, seed: int, dtype: torch.dtype) -> None:
    kept = torch.rand(array.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    whole = (torch.from_numpy(array) % 100 * kept).to(dtype)
    packed, values = encodings.encode_sparse(whole)
    assert torch.equal(encodings.decode_sparse(packed, values, tuple(whole.shape)), whole)
    smaller = packed.numel() + values.numel() * values.element_size() < whole.numel() * whole.element_size()
    assert encodings.sparse_pays(whole) == smaller


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(encodings.CannotEncode, match="1 of 2 weights"):
        encodings.quantize_int8(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(encodings.CannotEncode, match="no float16 scale"):
        encodings.quantize_int4(torch.tensor([[1e6]]))
