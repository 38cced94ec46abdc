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
"""The writer: parts, shards, the index, the last rename, and disks that are full or closed."""

import errno
import io
import json
import os
import struct
import subprocess

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hfcompress.errors import OutputError
from hfcompress.formats import writer as module
from hfcompress.formats.writer import CheckpointWriter, disk_errors, partial_path


BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "BOOL": 1}


def make_parts():
    """Names, dtypes and sizes that leave every tensor out of line when they are written one after the other."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.randn(3, 5, 7, generator=generator)
    return {
        "block-00000": {
            "model.layers.0.a.weight": odd.bfloat16(),
            "model.layers.0.a.weight_scale": torch.randn(3, 1, generator=generator).half(),
            "model.layers.0.a.weight_packed": torch.randint(-(2**31), 2**31, (3, 5), generator=generator).int(),
            "model.layers.0.a.weight_shape": torch.tensor([3, 35]),
            "model.layers.0.norm.weight": torch.randn(5, generator=generator),
        },
        "block-00001": {
            "model.layers.1.a.weight": torch.randint(-128, 128, (5, 3), generator=generator).to(torch.int8),
            "model.layers.1.a.bias": torch.randn(1, generator=generator).bfloat16(),
            "model.layers.1.mask": torch.tensor([True, False, True]),
        },
        "outside-00000": {"model.embed_tokens.weight": torch.randn(11, 3, generator=generator).double()},
        "outside-00001": {"model.scalar": torch.tensor(2.5), "model.empty": torch.zeros(0, 4)},
    }


def write(folder, parts, limit=None):
    writer = CheckpointWriter(folder / "model", **({} if limit is None else {"max_shard_bytes": limit}))
    writer.open()
    for name, tensors in parts.items():
        writer.write_part(name, tensors)
    return writer


def all_tensors(parts):
    return {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}


def read_header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length]), len(data)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# parts


def test_a_part_reads_back_and_leaves_no_temporary_file(tmp_path):
    parts = make_parts()
    writer = write(tmp_path, parts)
    for name, tensors in parts.items():
        assert writer.part(name).is_file()
        assert_equal(writer.read_part(name), tensors)
    assert sorted(p.name for p in writer.parts.iterdir()) == sorted(f"{name}.safetensors" for name in parts)
    assert not writer.output.exists()


def test_a_part_that_is_written_again_replaces_the_old_one(tmp_path):
    writer = write(tmp_path, {"a": {"x": torch.ones(3)}})
    writer.write_part("a", {"y": torch.zeros(2)})
    assert_equal(writer.read_part("a"), {"y": torch.zeros(2)})


def test_rows_of_one_stacked_tensor_and_transposed_ones_can_be_written_together(tmp_path):
    stacked = torch.arange(12.0).view(6, 2)
    parts = {"a": {"q": stacked[:2], "k": stacked[2:3], "v": stacked[3:], "t": torch.arange(6).view(2, 3).T}}
    writer = write(tmp_path, parts)
    assert_equal(writer.read_part("a"), parts["a"])


def test_a_part_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    writer = write(tmp_path, {"a": {"x": torch.ones(3)}})

    def fail(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="Input/output"):
        writer.write_part("a", {"x": torch.zeros(3)})
    assert_equal(writer.read_part("a"), {"x": torch.ones(3)})


# merge


def test_merge_makes_one_file_of_equal_tensors(tmp_path):
    parts = make_parts()
    writer = write(tmp_path, parts)
    assert not writer.merged
    writer.merge()
    assert writer.merged
    assert [p.name for p in writer.result.iterdir()] == ["model.safetensors"]
    assert_equal(load_file(writer.result / "model.safetensors"), all_tensors(parts))
    with safe_open(writer.result / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not writer.parts.exists()
    assert not (writer.partial / "merged").exists()


@pytest.mark.parametrize("limit", [None, 100])
def test_every_tensor_is_aligned_to_its_dtype(tmp_path, limit):
    writer = write(tmp_path, make_parts(), limit)
    writer.merge()
    for path in writer.result.glob("*.safetensors"):
        length, header, size = read_header(path)
        assert length % 8 == 0
        header.pop("__metadata__")
        end = 0
        for entry in header.values():
            begin, stop = entry["data_offsets"]
            assert begin == end  # no hole, no overlap
            assert (8 + length + begin) % BYTES[entry["dtype"]] == 0
            end = stop
        assert 8 + length + end == size


def test_header_stays_aligned_whatever_the_length_of_the_names(tmp_path):
    for extra in range(9):
        writer = write(tmp_path / str(extra), {"a": {"x" * (1 + extra): torch.ones(2)}})
        writer.merge()
        assert read_header(writer.result / "model.safetensors")[0] % 8 == 0


def test_tensors_larger_than_the_copy_buffer_arrive_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COPY_BYTES", 7)
    parts = make_parts()
    writer = write(tmp_path, parts)
    writer.merge()
    assert_equal(load_file(writer.result / "model.safetensors"), all_tensors(parts))


@pytest.mark.parametrize("limit", [1, 64, 200, 300])
def test_shards_and_their_index_hold_every_tensor_once(tmp_path, limit):
    parts = make_parts()
    expected = all_tensors(parts)
    writer = write(tmp_path, parts, limit)
    writer.merge()
    assert writer.merged
    files = sorted(p.name for p in writer.result.glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((writer.result / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    found = {}
    for name in files:
        shard = load_file(writer.result / name)
        assert shard
        assert not found.keys() & shard.keys()
        assert all(index["weight_map"][tensor] == name for tensor in shard)
        assert sum(t.nbytes for t in shard.values()) <= limit or len([t for t in shard.values() if t.nbytes]) == 1
        found |= shard
    assert_equal(found, expected)


def test_transformers_resolves_the_shards(tmp_path):
    from transformers.utils.hub import get_checkpoint_shard_files

    writer = write(tmp_path, make_parts(), 100)
    writer.merge()
    index = writer.result / "model.safetensors.index.json"
    paths, metadata = get_checkpoint_shard_files(str(writer.result), str(index))
    assert sorted(os.path.basename(p) for p in paths) == sorted(p.name for p in writer.result.glob("*.safetensors"))
    assert sorted(metadata["all_checkpoint_keys"]) == sorted(all_tensors(make_parts()))


def test_shards_do_not_depend_on_the_order_in_which_parts_were_written(tmp_path):
    parts = make_parts()
    one = write(tmp_path / "one", parts, 150)
    other = write(tmp_path / "other", dict(reversed(parts.items())), 150)
    for writer in (one, other):
        writer.merge()
    for path in one.result.iterdir():
        assert path.read_bytes() == (other.result / path.name).read_bytes()


def test_one_shard_needs_no_index_and_a_limit_that_just_fits_makes_no_second(tmp_path):
    parts = {"a": {"x": torch.ones(4)}, "b": {"y": torch.ones(4)}}
    writer = write(tmp_path, parts, 32)
    writer.merge()
    assert [p.name for p in writer.result.iterdir()] == ["model.safetensors"]


def test_unfinished_parts_are_left_out_and_removed(tmp_path):
    parts = make_parts()
    writer = write(tmp_path, parts)
    (writer.parts / "block-00002.tmp").write_bytes(b"half of it")
    writer.merge()
    assert_equal(load_file(writer.result / "model.safetensors"), all_tensors(parts))


def test_a_merge_that_stops_halfway_is_done_again(tmp_path, monkeypatch):
    parts = make_parts()
    writer = write(tmp_path, parts, 150)
    whole, shards = module._write_shard, []

    def stop_at_the_second(path, entries):
        if shards:
            raise KeyboardInterrupt
        shards.append(path)
        whole(path, entries)

    monkeypatch.setattr(module, "_write_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        writer.merge()
    monkeypatch.undo()
    again = CheckpointWriter(tmp_path / "model", 150)
    again.open()
    assert not again.merged
    assert again.merging
    again.merge()
    assert again.merged
    assert not again.merging
    found = {}
    for path in again.result.glob("*.safetensors"):
        found |= load_file(path)
    assert_equal(found, all_tensors(parts))


def test_a_merge_has_one_shard_at_most_beside_the_parts(tmp_path, monkeypatch):
    parts = {f"block-{i:05d}": {f"x{i}": torch.full((10_000,), float(i))} for i in range(8)}
    writer = write(tmp_path, parts, 80_000)
    before, most, whole = sum(map(size, writer.parts.iterdir())), [], module._write_shard

    def measured(path, entries):
        whole(path, entries)
        most.append(sum(size(file) for folder in (writer.parts, writer.result) for file in folder.iterdir()))

    monkeypatch.setattr(module, "_write_shard", measured)
    writer.merge()
    assert len(most) == 4
    assert max(most) <= before + 1.05 * 80_000


def size(path):
    return path.stat().st_size


@pytest.mark.parametrize("shard", [False, True])
def test_what_is_gone_halfway_through_a_merge_is_told(tmp_path, monkeypatch, shard):
    writer = write(tmp_path, {name: {name: torch.ones(100)} for name in ("a", "b")}, 400)
    whole = module._write_shard

    def stop_at_the_second(path, entries):
        if entries[0].name == "b":
            raise KeyboardInterrupt
        whole(path, entries)

    monkeypatch.setattr(module, "_write_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        writer.merge()
    monkeypatch.undo()
    made = writer.result / "model-00001-of-00002.safetensors"
    assert made.is_file()
    assert not writer.part("a").exists()
    (made if shard else writer.part("b")).unlink()
    with pytest.raises(
        OutputError, match=rf"{'a' if shard else 'b'}.safetensors is gone; start again with --overwrite"
    ):
        CheckpointWriter(tmp_path / "model", 400).merge()


@pytest.mark.parametrize("text", ["{", "[]", '{"model.safetensors": [{}]}', '{"model.safetensors": [{"path": 1}]}'])
def test_a_damaged_note_of_a_merge_is_told(tmp_path, text):
    writer = write(tmp_path, make_parts())
    (writer.partial / module.MERGING).write_text(text)
    with pytest.raises(OutputError, match=r"merging.json is damaged; start again with --overwrite"):
        writer.merge()
    assert writer.holds(next(iter(make_parts())))


def test_a_note_of_a_merge_leads_to_no_other_folder(tmp_path):
    """A file elsewhere is neither read nor deleted."""
    writer = write(tmp_path, {"a": {"x": torch.ones(4)}})
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(4)}, other)
    entry = {"name": "x", "dtype": "F32", "shape": [4], "size": 16, "path": str(other), "start": 72}
    (writer.partial / module.MERGING).write_text(json.dumps({"model.safetensors": [entry]}))
    with pytest.raises(OutputError, match=r"parts/other.safetensors is gone"):
        writer.merge()
    assert other.is_file()


def test_merged_is_true_only_when_shards_are_there_and_parts_are_not(tmp_path):
    writer = CheckpointWriter(tmp_path / "model")
    assert not writer.merged
    writer.open()
    assert not writer.merged
    writer.write_part("a", {"x": torch.ones(1)})
    assert not writer.merged
    (writer.result / "model.safetensors").write_bytes(b"")
    assert not writer.merged
    (writer.result / "model.safetensors").unlink()
    writer.merge()
    assert writer.merged
    CheckpointWriter(tmp_path / "model").open()  # what a run that resumes does
    assert writer.merged
    before = (writer.result / "model.safetensors").read_bytes()
    writer.parts.rmdir()
    writer.merge()
    assert (writer.result / "model.safetensors").read_bytes() == before


def test_a_truncated_part_ends_in_an_error(tmp_path, monkeypatch):
    writer = write(tmp_path, {"a": {"x": torch.ones(100)}})
    data = writer.part("a").read_bytes()
    writer.part("a").write_bytes(data[:-40])

    class Bounded(io.FileIO):
        """A file that cannot be read at its end more than ten times."""

        empty = 0

        def read(self, size=-1):
            chunk = super().read(size)
            self.empty += not chunk
            if self.empty > 10:
                pytest.fail("reads past the end for ever")
            return chunk

    monkeypatch.setattr(module, "open", Bounded, raising=False)
    with pytest.raises((OSError, ValueError)):
        writer.merge()


# the folder


def test_finish_gives_the_folder_its_name_and_leaves_nothing_else(tmp_path):
    parts = make_parts()
    writer = write(tmp_path, parts)
    writer.write_json("config.json", {"model_type": "llama"})
    source = tmp_path / "template.jinja"
    source.write_text("{{ messages }}")
    writer.copy(source, "additional_chat_templates/tool.jinja")
    writer.merge()
    assert not writer.output.exists()
    writer.finish()
    assert sorted(str(p.relative_to(writer.output)) for p in writer.output.rglob("*") if p.is_file()) == [
        "additional_chat_templates/tool.jinja",
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((writer.output / "config.json").read_text()) == {"model_type": "llama"}
    assert (writer.output / "additional_chat_templates" / "tool.jinja").read_text() == "{{ messages }}"
    assert_equal(load_file(writer.output / "model.safetensors"), all_tensors(parts))
    assert not writer.partial.exists()


def test_finish_replaces_what_was_there(tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    (output / "old.bin").write_bytes(b"old")
    (output / "config.json").write_text("{}")
    writer = write(tmp_path, {"a": {"x": torch.ones(3)}})
    writer.merge()
    writer.write_json("config.json", {"new": True})
    assert (output / "old.bin").is_file()  # until the last moment
    writer.finish()
    assert sorted(p.name for p in output.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((output / "config.json").read_text()) == {"new": True}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_finish_after_a_kill_between_its_two_renames(tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    (output / "old.bin").write_bytes(b"old")
    writer = write(tmp_path, {"a": {"x": torch.ones(3)}})
    writer.merge()
    os.replace(output, writer.partial / "replaced")
    again = CheckpointWriter(output)
    again.open()
    assert again.merged
    again.finish()
    assert [p.name for p in output.iterdir()] == ["model.safetensors"]
    assert not again.partial.exists()


def test_discard_removes_all_unfinished_work_and_nothing_else(tmp_path):
    writer = write(tmp_path, make_parts())
    writer.write_json("config.json", {})
    output = tmp_path / "model"
    output.mkdir()
    (output / "kept").write_text("kept")
    assert writer.partial == partial_path(output) == tmp_path / ".model.partial"
    writer.discard()
    assert not writer.partial.exists()
    assert (output / "kept").read_text() == "kept"
    writer.discard()  # nothing to remove is no error


# disks


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
    ids=["ENOSPC", "EDQUOT", "safetensors 28", "safetensors 122"],
)
def test_a_full_disk_is_one_sentence_that_names_the_disk(tmp_path, error):
    with pytest.raises(OutputError) as raised, disk_errors(tmp_path / "model"):
        raise error
    assert str(raised.value) == (
        f"The disk of {tmp_path / 'model'} is full; free some space, or choose another --output."
    )
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        PermissionError(errno.EPERM, "Operation not permitted"),
        OSError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
    ],
    ids=["PermissionError", "EPERM", "EACCES", "EROFS", "safetensors 13"],
)
def test_a_closed_folder_is_one_sentence_that_names_it(tmp_path, error):
    with pytest.raises(OutputError) as raised, disk_errors(tmp_path / "model"):
        raise error
    assert str(raised.value) == f"{tmp_path / 'model'} is not writable; choose another --output."


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone"), OSError(errno.EIO, "broken"), SafetensorError("damaged")]
)
def test_other_errors_pass_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as raised, disk_errors(tmp_path):
        raise error
    assert raised.value is error


def test_a_sentence_is_not_turned_into_another(tmp_path):
    with pytest.raises(OutputError, match="the first sentence"), disk_errors(tmp_path), disk_errors(tmp_path):
        raise OutputError("the first sentence")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="is not writable"):
        CheckpointWriter(closed / "model").open()


def mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    except OSError as error:
        pytest.skip(f"there is no mount: {error}")
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_part_that_does_not_fit_on_the_disk(small_disk):
    writer = CheckpointWriter(small_disk / "model")
    writer.open()
    writer.write_part("small", {"x": torch.ones(10)})
    with pytest.raises(OutputError, match=f"The disk of {small_disk / 'model'} is full"):
        writer.write_part("large", {"x": torch.ones(500_000)})
    assert not writer.part("large").exists()
    assert not writer.output.exists()
    assert_equal(writer.read_part("small"), {"x": torch.ones(10)})


def test_a_merge_that_does_not_fit_can_go_on_when_there_is_room(small_disk):
    tensors = {f"x{i}": torch.full((50_000,), float(i)) for i in range(3)}
    writer = CheckpointWriter(small_disk / "model", max_shard_bytes=700_000)
    writer.open()
    for name, tensor in tensors.items():
        writer.write_part(name, {name: tensor})
    with pytest.raises(OutputError, match=f"The disk of {small_disk / 'model'} is full"):
        writer.merge()
    assert not writer.merged
    assert not writer.output.exists()
    assert mount("-o", "remount,size=4m", str(small_disk)).returncode == 0
    again = CheckpointWriter(small_disk / "model", max_shard_bytes=700_000)
    again.open()
    again.merge()
    again.finish()
    found = {}
    for path in again.output.glob("*.safetensors"):
        found |= load_file(path)
    assert_equal(found, tensors)
    assert not [p for p in again.output.iterdir() if p.suffix == ".tmp"]


def test_a_json_file_and_a_copy_that_do_not_fit_on_the_disk(small_disk):
    writer = CheckpointWriter(small_disk / "model")
    writer.open()
    writer.write_json("config.json", {"old": True})
    with pytest.raises(OutputError, match="is full"):
        writer.write_json("config.json", {"new": "x" * 2_000_000})
    assert json.loads((writer.result / "config.json").read_text()) == {"old": True}
    source = small_disk.parent / "tokenizer.json"
    source.write_bytes(b"x" * 2_000_000)
    with pytest.raises(OutputError, match=f"The disk of {small_disk / 'model'} is full"):
        writer.copy(source, "tokenizer.json")
    assert not writer.output.exists()


def test_a_read_only_disk(small_disk):
    assert mount("-o", "remount,ro", str(small_disk)).returncode == 0
    with pytest.raises(OutputError, match=f"{small_disk / 'model'} is not writable"):
        CheckpointWriter(small_disk / "model").open()
