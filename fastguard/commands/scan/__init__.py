"""`fastguard scan`: finds NaN, Inf, spikes and steady growth in the logs of other trainers.

`lines` streams any log as blocks of clean lines, `suspects` finds the lines that must be parsed,
and `foreign` identifies files that are not text. For text, `tokens` distinguishes a NaN from a word
that contains "nan"; `values` distinguishes a value from a mention, using `words` and `names`;
`sentences` recognizes messages that training met one; `places` finds where in the run a line was
written. The dialects are `ultralytics`, `lightning`, `huggingface`, and `plain` for all others;
`shapes` parses lines that differ only in digits once. For data, `table` (CSV), `json_lines`,
`documents` (JSON) and `events` (TensorBoard) yield values with names and places, and `series`
judges them. Regular data is read many lines at a time: `objects` with the same names and the `rows`
of a table by column, `bare` numbers by count. `scanner` passes everything to `findings`, which
merges it into what is `found`.
"""
