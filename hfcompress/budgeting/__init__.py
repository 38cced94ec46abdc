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
"""A budget settled: which of its choices every linear gets, and what that is expected to cost.

How it works: every linear that is open to choice is a task of the plan in each of its choices, and what those take on
disk follows from shapes. One walk over the dense model solves each unit in each choice, one backward pass weighs the
errors, and the allocation is a knapsack. What comes out is nothing but `overrides` of the quantizing step, so the pass
that follows knows nothing of budgets. A bound on KL is met by trials: the prediction's scale is corrected by what a real
pass measures on rows that it has not seen.
"""
