# Copyright 2026 The hfcompress authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Writing beside reading."""

import threading

import pytest

import hfcompress as hfc
from hfcompress.errors import OutputError
from hfcompress.formats.writer import CheckpointWriter, partial_path
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.background import Background


PATIENCE = 60  # seconds, after which what is waited for will not come


def test_pieces_run_one_after_the_other_and_beside_the_caller():
    done, may_end = [], threading.Event()

    def first():
        assert may_end.wait(PATIENCE)
        done.append(1)

    with Background() as background:
        background.start(first)
        assert done == []  # though it has begun
        may_end.set()
        background.start(lambda: done.append(2))
        assert 1 in done
    assert done == [1, 2]


def test_what_a_piece_raises_is_raised_once_by_who_waits():
    def fails():
        raise OutputError("the disk is full")

    with Background() as background:
        background.start(fails)
        with pytest.raises(OutputError, match="the disk is full"):
            background.start(lambda: None)
        background.wait()
    with pytest.raises(OutputError), Background() as background:
        background.start(fails)


def test_the_callers_error_is_told_after_the_piece_has_ended():
    done, may_end = [], threading.Event()

    def last():
        assert may_end.wait(PATIENCE)
        done.append(1)
        raise OutputError("nobody asks")

    def interrupted():
        with Background() as background:
            background.start(last)
            may_end.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


def test_a_block_is_written_while_the_next_is_read(saved_llama, tmp_path, monkeypatch):
    """The writing of each block ends only when the next is being read, and the reading only when that has begun."""
    reading = {index: threading.Event() for index in range(10)}
    writing = {index: threading.Event() for index in range(10)}
    read, write = StreamedModel.block, CheckpointWriter.write_part

    def block(self, index):
        if index and not reading[index].is_set():
            reading[index].set()
            assert writing[index - 1].wait(PATIENCE)
        return read(self, index)

    def write_part(self, name, tensors):
        if name.startswith("block-"):
            index = int(name.removeprefix("block-"))
            writing[index].set()
            assert index == 2 or reading[index + 1].wait(PATIENCE)  # the last of three
        write(self, name, tensors)

    monkeypatch.setattr(StreamedModel, "block", block)
    monkeypatch.setattr(CheckpointWriter, "write_part", write_part)
    hfc.compress(saved_llama, hfc.RTN(bits=8, group_size=32), tmp_path / "out", evaluate=False)
    assert writing[2].is_set()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_block_that_cannot_be_written_ends_the_run_and_those_before_it_stay(saved_llama, tmp_path, monkeypatch):
    write = CheckpointWriter.write_part

    def full(self, name, tensors):
        if name == "block-00001":
            raise OutputError("The disk is full")
        write(self, name, tensors)

    monkeypatch.setattr(CheckpointWriter, "write_part", full)
    with pytest.raises(OutputError, match="The disk is full"):
        hfc.compress(saved_llama, hfc.RTN(bits=8, group_size=32), tmp_path / "out", evaluate=False)
    assert [path.name for path in (partial_path(tmp_path / "out") / "parts").iterdir()] == ["block-00000.safetensors"]
    monkeypatch.undo()
    hfc.compress(saved_llama, hfc.RTN(bits=8, group_size=32), tmp_path / "out", evaluate=False, resume=True)
