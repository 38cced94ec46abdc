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
"""
The library's own format: each tensor in as many bits as it is worth.

config.json says `"quantization_config": {"quant_method": "hfcompress", "version": 1}`. Beside ordinary tensors there
are coded ones, of which a matrix called `NAME.weight` is stored under several names that begin with `NAME.weight`. Five
kinds are known, told by those names: [`hfcompress.formats.native.codebook`] (levels of each row or group, entropy-coded or not),
[`hfcompress.formats.native.vectors`] (vectors that a weight shares), [`hfcompress.formats.native.factors`] (a product), and,
both of them entropy-coded, [`hfcompress.formats.native.coded`] (a grid) and [`hfcompress.formats.native.lossless`] (the values
as they were). What is entropy-coded has a stream ([`hfcompress.solvers.entropy`]) of symbols, one byte for each entry of the
matrix:

- `NAME.weight` uint16 `(words,)`: the words of all chunks. A chunk is as many whole rows as have at most 65536 entries,
  and at least one row. Its first 16 words are the 8 states, the lower half of each first; the words that states are
  filled up with follow in the order in which they are needed. The entry in column `j` belongs to the state `j % 8`.
- `NAME.weight_index` int64 `(2, chunks)`: how many words each chunk has, and the CRC-32 of its words, begun with that of
  what the kind names, `weight_frequencies`, the classes of the rows and those of the columns, in this order.
- `NAME.weight_frequencies` uint16: one table after the other, how many symbols it has, and how often each of them occurs,
  of 4096. The table of an entry has the number that the classes of its row and of its column have as their sum; one that
  no entry has is of no symbols.

With a state `x` of 32 bits, `slot = x % 4096` and a table whose symbol `s` begins at `c[s]`, the next symbol is the one
with `c[s] <= slot < c[s] + f[s]`, and `x` becomes `f[s] (x // 4096) + slot - c[s]`; where that is below 65536, it is
multiplied by 65536 and the next word is added. Behind the last symbol every state is 65536 and no word is left.

The weight keeps its name and not its shape: a loader that does not know the format stops there.
[`hfcompress.integrations.transformers`] teaches it to transformers.
"""

from hfcompress.formats.native.layout import QUANT_METHOD, Native, decoded


__all__ = ["QUANT_METHOD", "Native", "decoded"]
