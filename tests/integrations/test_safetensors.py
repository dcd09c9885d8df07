"""`fastguard ckpt verify` accepts exactly the files that the safetensors library opens."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file, save_model

from fastguard import GuardedOptimizer
from fastguard.checkpoints import DamagedFile, inspect

DTYPES = """
    BOOL U8 I8 U16 I16 U32 I32 U64 I64 F4 F6_E2M3 F6_E3M2 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ
    F8_E5M2FNUZ F16 BF16 F32 F64 C64 F99 f32
""".split()
NUMBERS = st.one_of(
    st.integers(-1, 17), st.sampled_from([2.0, True, None, "2", 2**32, 2**63, 2**64])
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=3),
    }
)
METADATA = st.one_of(st.none(), st.dictionaries(st.text(max_size=2), st.text(max_size=2)), NUMBERS)


def opens(path):
    try:
        with safe_open(path, "pt") as file:
            return sorted(file.keys())
    except SafetensorError:
        return None


def is_whole(path):
    try:
        inspect(path)
    except DamagedFile:
        return False
    return True


@given(st.dictionaries(st.sampled_from("abc"), TENSOR, max_size=3), METADATA, st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_any_header_is_accepted_if_and_only_if_safetensors_accepts_it(
    tmp_path_factory, tensors, metadata, n_bytes
):
    header = {**tensors, "__metadata__": metadata}
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(n_bytes))
    assert is_whole(path) == (opens(path) is not None), header


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_header_with_one_changed_byte_gets_the_same_verdict_as_from_safetensors(
    tmp_path_factory, data
):
    folder = tmp_path_factory.getbasetemp()
    tensors = {
        "a": torch.ones(2, 3),
        "b.c": torch.ones(4, dtype=torch.bfloat16),
        "n": torch.tensor(7),
        "none": torch.empty(0, 2),
    }
    save_file(tensors, folder / "whole.safetensors", metadata={"epoch": "3"})
    assert is_whole(folder / "whole.safetensors")
    raw = bytearray((folder / "whole.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    place = data.draw(st.integers(8, 8 + length - 1))
    raw[place] = data.draw(st.sampled_from(list(b'0123456789[]{},:" -.eE\\nabt')))
    path = folder / "changed.safetensors"
    path.write_bytes(raw)
    found = opens(path)
    if found is None:
        assert not is_whole(path), bytes(raw[8 : 8 + length])
    elif len(found) == len(tensors):  # otherwise a name is repeated, which the library accepts
        assert is_whole(path), bytes(raw[8 : 8 + length])


@pytest.mark.parametrize("n_more", [1, 8])
def test_bytes_after_the_last_tensor_are_refused(tmp_path, n_more):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    assert is_whole(path)
    path.write_bytes(path.read_bytes() + bytes(n_more))
    assert opens(path) is None
    assert not is_whole(path)


def test_a_model_with_flat_parameters_must_be_saved_as_a_state_dict(tmp_path):
    """`save_model` refuses tensors that do not own their whole storage."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    GuardedOptimizer(optimizer, flat_parameters=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value)
    with pytest.raises(RuntimeError, match="covering the entire storage"):
        save_model(model, tmp_path / "model.safetensors")
