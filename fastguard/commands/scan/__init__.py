"""`fastguard scan`: where the logs of other trainers hold NaN, Inf, a spike or steady growth.

`lines` streams any log as blocks of clean lines, `suspects` finds the lines that must be read, and
`foreign` names what is no text. Text: `tokens` tells a NaN from a word that has "nan" in it,
`values` a value from a mention by `words` and `names`, `sentences` knows how training says that it
met one, `places` where in the run a line was written. The dialects are `ultralytics`, `lightning`,
`huggingface`, and `plain` for all others; `shapes` reads lines that differ in digits alone once.
Data: `table` (CSV), `json_lines`, `documents` (JSON) and `events` (TensorBoard) give values with
names and places, and `series` judges them. What lines up is read many lines at a time: `objects`
with the same names and the `rows` of a table by columns, `bare` numbers by their count. `scanner`
gives it all to `findings`, which joins it to what is `found`.
"""
