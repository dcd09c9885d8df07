"""`fastguard scan`: finds NaN, Inf, spikes and steady growth in the logs of other trainers.

Reading: `lines` streams a log as blocks of clean lines, `suspects` finds the lines that must be
parsed, `foreign` identifies files that are not text, and `budget` bounds the work.

Text: `spellings` recognizes NaN and Inf as programs print them, and `values` decides whether one is
a value or only a word, with the `vocabulary` of metrics, bounds and settings, and the nearest of
the `names` in its clause. `sentences` recognizes messages that report NaN or Inf, and `places`
finds the epoch, batch and step. The formats are `ultralytics`, `lightning` and `huggingface`;
`plain` handles all other lines. `text` reads lines of text in batches; `shapes` parses lines that
differ only in digits once, and `wording` extends this to words without a meaning.

Structured data: `table` (CSV), `json_lines`, `documents` (JSON) and `events` (TensorBoard) yield
values with names and places, and `series` judges them. `insets` finds tables and objects that are
printed between lines of text. `objects`, `rows` and `bare` process many
lines at once.

Results: `scanner` passes everything to `findings`, which merges it into the results in `found`.
"""
