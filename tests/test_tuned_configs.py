"""Tuned configs, which override the rules of launch configurations."""

import json
import threading

import pytest
import torch

from effnet_kernels.backends.triton.configs import H100, tuned_configs
from effnet_kernels.backends.triton.configs.depthwise import forward
from effnet_kernels.backends.triton.configs.pointwise import gemm


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNET_KERNELS_TABLE", str(tmp_path / "folder" / "table.json"))
    tuned_configs.clear_caches()
    yield tuned_configs.default_path()
    monkeypatch.undo()
    tuned_configs.clear_caches()


def a_gemm():
    return gemm(1, 1, 12544, 480, 80, None, False, False, torch.float16, H100)


def test_entries_override_the_rule_for_their_bucket(path):
    before, other = a_gemm(), gemm(1, 1, 12544, 480, 1280, None, False, False, torch.float16, H100)
    seen = []
    with tuned_configs.override(lambda key, tile: seen.append(key) or tile):
        a_gemm()
    tuned_configs.write(path, {seen[0]: {"block_m": 32}})
    assert a_gemm().block_m == 32 != before.block_m
    assert a_gemm().num_programs > before.num_programs, "the number of programs follows from the tuned tile"
    assert gemm(1, 1, 12544, 480, 1280, None, False, False, torch.float16, H100) == other
    # A neighbour in the same bucket of sizes follows too.
    assert gemm(1, 1, 12000, 500, 79, None, False, False, torch.float16, H100).block_m == 32


def test_launches_of_other_threads_are_overridden(path):
    """Autograd calls the backward kernels of a GPU from a thread of its own."""
    seen = []
    with tuned_configs.override(lambda key, tile: seen.append(key) or tile):
        thread = threading.Thread(target=a_gemm)
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_the_file_has_its_own_names_for_fields(path):
    gemm_key, weight_key = "cuda90/gemm/float16/rows2", "cuda90/weight_gradient/float16/rows2"
    configs = {gemm_key: {"block_m": 1, "block_n": 2, "block_k": 3}, weight_key: {"block_m": 4, "block_k": 5}}
    tuned_configs.write(path, configs)
    in_file = json.loads(path.read_text())
    assert in_file[gemm_key] == {"block_rows": 1, "block_columns": 2, "block_inner": 3}
    assert in_file[weight_key] == {"block_outputs": 4, "block_rows": 5}
    assert tuned_configs.read(path) == configs


def test_writing_keeps_what_is_there(path):
    tuned_configs.write(path, {"a": {"width": 4}})
    tuned_configs.write(path, {"b": {"width": 7}})
    assert tuned_configs.read(path) == {"a": {"width": 4}, "b": {"width": 7}}


@pytest.mark.parametrize("content", ["not json", "[1]", json.dumps({"a": {"width": "wide"}})])
def test_another_kind_of_file_is_an_error_that_names_it(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json: expected tuned launch configurations"):
        tuned_configs.read(path)


def test_rules_keep_their_answers(path):
    arguments = (64, 480, 14, 14, 5, 1, 256, torch.float16, H100)
    assert forward(*arguments) is forward(*arguments)
