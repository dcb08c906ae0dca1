"""The table that overrides the rules of launch configurations."""

import json
import threading

import pytest
import torch

from effnet_kernels.launch_config import H100, table
from effnet_kernels.launch_config.depthwise import forward
from effnet_kernels.launch_config.pointwise import gemm


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNET_KERNELS_TABLE", str(tmp_path / "folder" / "table.json"))
    table.forget()
    yield table.default_path()
    monkeypatch.undo()
    table.forget()


def a_gemm():
    return gemm(1, 1, 12544, 480, 80, None, False, False, torch.float16, H100)


def test_entries_override_the_rule_for_their_bucket(path):
    before, other = a_gemm(), gemm(1, 1, 12544, 480, 1280, None, False, False, torch.float16, H100)
    seen = []
    with table.watching(lambda key, tile: seen.append(key) or tile):
        a_gemm()
    table.write(path, {seen[0]: {"block_rows": 32}})
    assert a_gemm().block_rows == 32 != before.block_rows
    assert a_gemm().chunks > before.chunks, "what follows from the tile is computed anew"
    assert gemm(1, 1, 12544, 480, 1280, None, False, False, torch.float16, H100) == other
    # A neighbour in the same bucket of sizes follows too.
    assert gemm(1, 1, 12000, 500, 79, None, False, False, torch.float16, H100).block_rows == 32


def test_lookups_of_other_threads_are_watched(path):
    """Autograd calls the backward kernels of a GPU from a thread of its own."""
    seen = []
    with table.watching(lambda key, tile: seen.append(key) or tile):
        thread = threading.Thread(target=a_gemm)
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_writing_keeps_what_is_there(path):
    table.write(path, {"a": {"width": 4}})
    table.write(path, {"b": {"width": 7}})
    assert table.read(path) == {"a": {"width": 4}, "b": {"width": 7}}


@pytest.mark.parametrize("content", ["not json", "[1]", json.dumps({"a": {"width": "wide"}})])
def test_another_kind_of_file_is_an_error_that_names_it(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json: expected a launch table"):
        table.read(path)


def test_without_a_table_a_question_is_answered_once(path):
    arguments = (64, 480, 14, 14, 5, 1, 256, torch.float16, H100)
    assert forward(*arguments) is forward(*arguments)
