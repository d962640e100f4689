"""Property tests of checkpoints with random contents and random corruption."""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.run_folder.checkpoint import load_model, load_training, save_checkpoint
from llm.run_folder.checkpoint_files import MANIFEST, read_manifest, verify
from llm.run_folder.plain import map_tensors, plain, tensors_in

SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8)
TREES = st.recursive(
    SCALARS | st.lists(st.floats(-1, 1, width=32), max_size=3).map(torch.tensor),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def saved(folder, training=None):
    state = {"w": torch.arange(20.0).reshape(4, 5), "n": torch.arange(3)}
    save_checkpoint(folder, model_state=state, training_state={"t": training}, manifest={"step": 3})
    return state


@FEW
@given(TREES)
def test_plain_data_is_loaded_as_it_was_saved(tree):
    with tempfile.TemporaryDirectory() as name:
        state = saved(Path(name) / "c", tree)
        assert verify(Path(name) / "c") == []
        assert same(load_training(Path(name) / "c")["t"], tree)
        assert same(load_model(Path(name) / "c"), state)


@given(TREES)
def test_copies_of_plain_data_are_equal_and_share_no_tensor(tree):
    copy = map_tensors(plain(tree), torch.clone)
    assert same(copy, tree)
    own = {tensor.data_ptr() for tensor in tensors_in(tree) if tensor.numel()}
    assert not own & {tensor.data_ptr() for tensor in tensors_in(copy) if tensor.numel()}


@FEW
@given(st.data())
def test_a_changed_missing_or_added_byte_is_detected(data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "c"
        saved(folder, [1.5])
        victim = folder / data.draw(st.sampled_from(sorted(read_manifest(folder)["files"])))
        content = bytearray(victim.read_bytes())
        match data.draw(st.sampled_from(["flip", "cut", "grow", "remove"])):
            case "flip":
                content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del content[data.draw(st.integers(0, len(content) - 1)) :]
            case "grow":
                content += data.draw(st.binary(min_size=1, max_size=9))
            case "remove":
                content = None
        victim.unlink() if content is None else victim.write_bytes(content)
        assert any(victim.name in problem for problem in verify(folder))


@FEW
@given(st.binary(max_size=200))
def test_a_manifest_of_random_bytes_is_reported_and_raises_nothing(content):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "c"
        saved(folder)
        (folder / MANIFEST).write_bytes(content)
        assert verify(folder)
